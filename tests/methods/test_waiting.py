"""No step asks the device for a number: on a GPU each such question is a wait for all that is queued."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from method_config import TASK_KWARGS, baseline_config, icl_msr_config, method_config, task_settings
from method_training import train
from torch.utils._python_dispatch import TorchDispatchMode

from metamask_plugin.methods import METHODS
from metamask_plugin.methods.numeric_guard import Look, NumericGuard

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
aten = torch.ops.aten
QUESTIONS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default}
"""Whose result the host needs: a number, or a shape."""
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}


class Questions(TorchDispatchMode):
    """Counts the operators that a GPU's host would have to wait for."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func in INDEXING and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.found[str(func)] += func in QUESTIONS or by_mask
        return func(*args, **(kwargs or {}))


@contextmanager
def counted(found):
    with Questions() as questions:
        yield
    found.update(questions.found)


@pytest.fixture
def gpu():
    yield
    torch.cuda.set_sync_debug_mode("default")  # after a failure, too


@contextmanager
def refused():
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def build(config, task, **overrides):
    torch.manual_seed(0)
    cfg = config(**task_settings(task), **overrides)
    return METHODS[cfg.method](cfg)


def train_within(model, context, original=False, **kwargs):
    """Trains three steps, the second, from forward pass to the last hook, within ``context``.

    Returns the trainer, once it is sure that the three steps were made and the second was watched.
    """
    step, end, entered = model.training_step, model.on_train_batch_end, []

    def training_step(batch, batch_idx):
        if batch_idx == 1:
            entered.append(context())
            entered[0].__enter__()
        return step(batch, batch_idx)

    def on_train_batch_end(outputs, batch, batch_idx):
        end(outputs, batch, batch_idx)
        if batch_idx == 1:
            entered[0].__exit__(None, None, None)

    model.training_step, model.on_train_batch_end = training_step, on_train_batch_end
    trainer = train(model, 3, original=original, **kwargs)
    assert len(entered) == 1 and trainer.global_step == 3
    return trainer


@pytest.mark.parametrize("config", [baseline_config, method_config, icl_msr_config])
@pytest.mark.parametrize("task", TASK_KWARGS)
def test_no_step_asks_for_a_number(monkeypatch, config, task):
    # two looks that are read later, and the step counter of Adam, which stays on the host on a GPU too
    monkeypatch.setattr(NumericGuard, "_deferred", lambda self, method: True)
    monkeypatch.setattr(Look, "failed", False)
    # what only a CPU is asked
    for module in ("contrastive", "whitening"):
        monkeypatch.setattr(f"metamask_plugin.losses.{module}.can_be_asked", lambda answer: False)
    model, found = build(config, task), Counter()
    if config is not baseline_config:
        model.meta.cfg.optimizer = {"name": "sgd", "lr": 1e-2, "weight_decay": 0.0, "kwargs": {}}
    train_within(model, lambda: counted(found), config is icl_msr_config)
    assert not +found


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("config", [baseline_config, method_config, icl_msr_config])
@pytest.mark.parametrize("task", TASK_KWARGS)
def test_no_step_waits_for_the_gpu(gpu, config, task, precision):
    model = build(config, task)
    if config is not baseline_config and precision != "32-true":
        model.meta.dtype = torch.bfloat16
    original = config is icl_msr_config
    trainer = train_within(model, refused, original, accelerator="gpu", precision=precision)
    assert trainer.strategy.root_device.type == "cuda"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("meta", [{"when": "before_step"}, {"estimator": "finite_difference"}])
def test_no_other_meta_step_waits_for_the_gpu(gpu, meta):
    model = build(method_config, "simclr")
    model.meta.cfg.update(meta)
    model.meta.__init__(model.meta.cfg)
    assert train_within(model, refused, accelerator="gpu").strategy.root_device.type == "cuda"


@pytest.mark.gpu
@needs_gpu
def test_a_wait_for_the_gpu_is_refused(gpu):
    number = torch.ones((), device="cuda")
    with pytest.raises(RuntimeError, match="synchronizing"), refused():
        number.item()


def test_a_question_is_counted():
    x, found = torch.ones(3), Counter()
    with counted(found):
        x.sum().item()
        x[x > 0]
    assert found.total() == 2
