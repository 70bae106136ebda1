"""What must not grow: memory over meta steps; processes, files, threads and shared memory over epochs."""

import contextlib
import gc
import multiprocessing
import os
import threading
import weakref
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from method_config import icl_msr_config, method_config
from method_training import quiet_trainer
from test_processes import WORKERS, config
from torch.utils.data import DataLoader, Dataset

from metamask_plugin.bilevel import ESTIMATORS, InnerStep, PlainStep
from metamask_plugin.cli import pretrain
from metamask_plugin.methods import ICLMSR, MetaMask
from metamask_plugin.training.callbacks import Progress

STEPS, SETTLED = 1000, 100
RESIDENT_BOUND = 16e6
"""Bytes. One graph kept each step is a multiple of it after 900 of them, see the last test of its section."""

TINY = {"backbone__kwargs": {"width": 8}, "optimizer__batch_size": 4}
TRIAL = InnerStep(PlainStep(0.1), PlainStep(0.1))


def build(method, estimator):
    torch.manual_seed(0)
    if method == "icl_msr":
        return ICLMSR(icl_msr_config(crop_size=16, method_kwargs__meta={"estimator": estimator}, **TINY))
    return MetaMask(method_config(crop_size=16, method_kwargs__meta={"estimator": estimator}, **TINY))


def meta_step(model, views, original):
    """A method's meta step without a trainer: the meta-gradient, and a step of the meta parameters."""
    parameters = list(model.meta_parameters())
    if isinstance(model, ICLMSR):
        leaves = {name: p.detach().requires_grad_() for name, p in model.regularizer.named_parameters()}
        own = torch.func.functional_call(model.regularizer, leaves, (original,))
        gradient = model.meta.estimator.gradient(model.meta_problem(views, own.detach()), TRIAL).outer_params[
            0
        ]
        gradients = torch.autograd.grad(own, list(leaves.values()), gradient)
    else:
        gradients = model.meta.estimator.gradient(model.meta_problem(views), TRIAL).outer_params
    with torch.no_grad():
        for parameter, grad in zip(parameters, gradients, strict=True):
            parameter -= 1e-3 * grad


def live_tensors():
    """Number of tensors that Python knows, and bytes of their storages."""
    gc.collect()
    count, storages = 0, {}
    for thing in gc.get_objects():
        # what another test of this process has left has no storage: lazy parameters, fakes of torch.compile
        if issubclass(type(thing), torch.Tensor) and not torch.nn.parameter.is_lazy(thing):
            with contextlib.suppress(RuntimeError):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                count += 1
    return count, sum(storages.values())


def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _Saved:
    def __init__(self, tensor):
        self.tensor = tensor


@contextlib.contextmanager
def saved_for_backward():
    """The tensors that graphs made within it still hold: Python's collector does not see those."""
    alive = weakref.WeakSet()

    def pack(tensor):
        saved = _Saved(tensor.detach())
        alive.add(saved)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        yield alive


def assert_flat(method, estimator, steps, settled):
    model = build(method, estimator)
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    original = torch.randn(4, 3, 20, 20)
    for step in range(1, steps + 1):
        meta_step(model, views, original)
        if step == settled:
            tensors, resident = live_tensors(), resident_bytes()
    assert live_tensors() == tensors
    assert resident_bytes() - resident < RESIDENT_BOUND
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["metamask", "icl_msr"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_memory_is_flat_over_meta_steps(method, estimator):
    assert_flat(method, estimator, steps=20, settled=10)


@pytest.mark.slow
@pytest.mark.load("1,000 meta steps of each estimator under either method, by themselves")
@pytest.mark.parametrize("method", ["metamask", "icl_msr"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_memory_is_flat_over_a_thousand_meta_steps(method, estimator):
    assert_flat(method, estimator, STEPS, SETTLED)


class Noise(Dataset):
    """Views of noise without end; a few images over and over."""

    def __init__(self, count, sizes):
        self.count, self.images = count, [torch.randn(16, 3, size, size) for size in sizes]

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return index, [images[index % 16] for images in self.images], index % 10


class Census(pl.Callback):
    """Takes stock at two steps, behind the meta step: in the middle of the next batch."""

    def __init__(self, *steps):
        self.steps, self.stock = steps, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx in self.steps:
            self.stock.append((*live_tensors(), resident_bytes()))


def assert_flat_training(method, when, steps, settled):
    model = build(method, "exact")
    model.meta.shared, model.meta.cfg.when = when == "before_step", when
    sizes = [16, 16, 20] if method == "icl_msr" else [16, 16]
    census = Census(settled, steps - 1)
    trainer = quiet_trainer(callbacks=[census])
    trainer.fit(model, DataLoader(Noise(4 * steps, sizes), batch_size=4))
    assert trainer.global_step == steps
    (early, late) = census.stock
    assert late[:2] == early[:2]
    assert late[2] - early[2] < RESIDENT_BOUND


WHEN = [("metamask", "after_step"), ("icl_msr", "after_step"), ("icl_msr", "before_step")]


@pytest.mark.parametrize(("method", "when"), WHEN)
def test_memory_is_flat_over_a_training(method, when):
    assert_flat_training(method, when, steps=20, settled=10)


@pytest.mark.slow
@pytest.mark.load("1,000 regular and meta steps under a Trainer")
@pytest.mark.parametrize(("method", "when"), WHEN)
def test_memory_is_flat_over_a_training_of_a_thousand_steps(method, when):
    assert_flat_training(method, when, STEPS, SETTLED)


@pytest.mark.parametrize("method", ["metamask", "icl_msr"])
@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_no_graph_outlives_its_meta_step(method, estimator):
    model = build(method, estimator)
    views, original = [torch.randn(4, 3, 16, 16) for _ in range(2)], torch.randn(4, 3, 20, 20)
    with saved_for_backward() as alive:
        meta_step(model, views, original)
        seen = getattr(alive, "_pending_removals", None) is not None
        gc.collect()
        assert seen and len(alive) == 0


def test_a_graph_that_is_kept_is_seen():
    """So that the tests above can fail."""
    model = build("metamask", "exact")
    views = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    tensors, kept = live_tensors(), []
    with saved_for_backward() as alive:
        kept.append(model(views[0])["feats"].sum())
        gc.collect()
        first = len(alive)
        kept.append(model(views[1])["feats"].sum())
        gc.collect()
        assert len(alive) > first > 0
    assert live_tensors() != tensors


def held():
    """What this process holds that a crash of the bookkeeping would leave: counts, by kind."""
    own = str(os.getpid())
    children = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended in the meantime
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
            if parent == own:
                children.append(state)
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "python threads": threading.active_count(),
        "children": len(children),
        "zombies": children.count("Z"),
        "shared memory": sum(own in name for name in os.listdir("/dev/shm")),
    }


@pytest.mark.parametrize(
    "epochs",
    [
        pytest.param(8, id="8"),
        pytest.param(
            50,
            id="50",
            marks=[
                pytest.mark.slow,
                pytest.mark.load("50 epochs with two workers, kNN and a checkpoint each"),
            ],
        ),
    ],
)
def test_nothing_is_held_for_longer_over_epochs(tmp_path, monkeypatch, epochs):
    settled, seen = 3, []
    plain = Progress.on_train_epoch_end

    def count(self, trainer, *args):
        plain(self, trainer, *args)
        seen.append(held())

    monkeypatch.setattr(Progress, "on_train_epoch_end", count)
    pretrain.run(config(tmp_path / "warm", *WORKERS, "++limit_train_batches=1", "max_epochs=1"))
    gc.collect()
    before, seen[:] = held(), []
    short = ["++limit_train_batches=2", f"max_epochs={epochs}", "++evaluation.enabled=True"]
    short += [
        "++evaluation.knn.k=[5]",
        "++evaluation.final_report=False",
        "++evaluation.knn.every_n_epochs=1",
    ]
    pretrain.run(config(tmp_path, *WORKERS, *short))
    assert len(seen) == epochs
    assert max(counts["zombies"] for counts in seen) == 0, seen
    for kind in seen[0]:
        # the most of some: a worker that is about to end may be there still when an epoch's end is counted
        first, last = (max(counts[kind] for counts in part) for part in (seen[:settled], seen[-settled:]))
        ending = 8 if kind == "files" else 2  # a worker has four
        assert last <= first + ending, (kind, [counts[kind] for counts in seen])
    gc.collect()
    assert multiprocessing.active_children() == []
    after = held()
    for kind in ("files", "children", "zombies", "python threads", "shared memory"):
        assert after[kind] <= before[kind], (kind, before, after)
