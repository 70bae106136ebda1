"""Two processes with half of a batch each train as one process with all of it."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from method_config import baseline_config, icl_msr_config, method_config, task_settings
from method_training import Views
from torch import nn
from torch.utils.data import DataLoader, Subset

from metamask_plugin.errors import UserError
from metamask_plugin.methods import ICLMSR, Baseline, MetaMask, Supervised
from metamask_plugin.methods.meta_checks import check_run

# BatchNorm in the encoder sees its own process's images, as everywhere under DistributedDataParallel; the
# heads keep theirs, which sees the joint batch
NORM_FREE = {"backbone__kwargs": {"norm": "group"}, "optimizer__lr": 0.01}
RUNS = {
    "metamask": (MetaMask, method_config, "simclr", {}),
    "metamask, shared": (MetaMask, method_config, "simclr", {"when": "before_step"}),
    "metamask, finite difference": (
        MetaMask,
        method_config,
        "simclr",
        {"estimator": "finite_difference", "estimator_kwargs": {"r": 1e-4}},
    ),
    "metamask over moco": (MetaMask, method_config, "moco", {}),
    "metamask over swav": (MetaMask, method_config, "swav", {"trial_on": "heads"}),
    "icl_msr": (ICLMSR, icl_msr_config, "simclr", {}),
    "icl_msr over byol, shared": (ICLMSR, icl_msr_config, "byol", {"when": "before_step"}),
    "barlow_twins alone": (Baseline, baseline_config, "barlow_twins", None),
    "wmse alone": (Baseline, baseline_config, "wmse", None),
    "supervised": (Supervised, baseline_config, "simclr", None),
}


def run(name, processes, **overrides):
    """Two steps of a joint batch of 8; returns the trained model."""
    constructor, config, task, meta = RUNS[name]
    settings = {**NORM_FREE, **task_settings(task), **overrides}
    if meta is not None:
        settings["method_kwargs__meta"] = meta
    pl.seed_everything(0)
    model = constructor(config(**settings))
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        precision="64-true",
        max_epochs=1,
        use_distributed_sampler=False,
        limit_train_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    original = constructor is ICLMSR
    own = range(int(os.environ.get("LOCAL_RANK", 0)), 16, processes)
    data = Subset(Views(16, original=original), own)
    trainer.fit(model, DataLoader(data, batch_size=8 // processes))
    return model


SCRIPT = """
import sys
from pathlib import Path
import torch
from test_joint_batch import RUNS, run
from metamask_plugin.errors import UserError
from metamask_plugin.tasks.wmse import WMSE

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in RUNS:
        model = run(name, 2)
        if model.trainer.is_global_zero:
            torch.save(model.state_dict(), f"{sys.argv[1]}/{name}.pt")
    torch.manual_seed(torch.distributed.get_rank())
    task = WMSE(8, proj_output_dim=2, whitening_size=2)
    slices = torch.cat(task._partitions(torch.randn(8, 2))[0])
    gathered = [torch.empty_like(slices) for _ in range(2)]
    torch.distributed.all_gather(gathered, slices)
    permutation = sorted(slices.tolist()) == list(range(8))
    said = [f"slices {torch.equal(*gathered)} {permutation}"]
    RUNS["unrolled"] = (*RUNS["metamask"][:3], {"estimator": "unrolled"})
    try:
        run("unrolled", 2)
    except UserError as error:
        said.append(str(error))
    # not printed: lines of two processes run into one another
    Path(sys.argv[1], f"said-{torch.distributed.get_rank()}").write_text("\\n".join(said))
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two_processes")
    script = folder / "two.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).resolve().parents[1]
    done = subprocess.run(
        [sys.executable, str(script), str(folder)],
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "PYTHONPATH": f"{tests}:{tests / 'methods'}"},
    )
    return folder, done


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_are_one(two_processes, name):
    folder, done = two_processes
    path = folder / f"{name}.pt"
    assert path.exists(), done.stderr[-3000:]
    two = torch.load(path, weights_only=True)
    one = run(name, 1)
    meta = [key for key in two if key.startswith(("mask.", "regularizer."))]
    assert meta or issubclass(RUNS[name][0], Baseline)
    for key, value in one.state_dict().items():
        if value.is_floating_point() and "queue" not in key and "bank" not in key:
            # queues hold the same entries in another order
            torch.testing.assert_close(two[key], value, rtol=1e-10, atol=1e-11, msg=key)


@pytest.mark.parametrize("rank", [0, 1])
def test_processes_draw_the_same_slices_and_refuse_to_unroll(two_processes, rank):
    folder, done = two_processes
    path = folder / f"said-{rank}"
    assert path.exists(), done.stderr[-3000:]
    slices, refused = path.read_text().splitlines()
    assert slices == "slices True True"
    assert refused.startswith("method_kwargs.meta.estimator must be another than unrolled where several")


def check_ranks(model, ranks):
    check_run(model.meta.cfg, model, "32-true", ranks)


def test_synchronised_batch_norm_is_refused_in_several_processes():
    model = MetaMask(method_config())
    check_ranks(model, 2)
    nn.SyncBatchNorm.convert_sync_batchnorm(model.task)
    check_ranks(model, 1)
    with pytest.raises(UserError, match="sync_batchnorm must be False with a meta step, got True"):
        check_ranks(model, 2)
