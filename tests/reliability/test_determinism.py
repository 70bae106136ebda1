"""The same seed gives the same weights, bit for bit: what that holds for, and what it does not."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from composing import PATHS
from method_config import baseline_config, icl_msr_config, method_config, task_settings
from method_training import train
from PIL import Image
from test_processes import config

from metamask_plugin.cli import pretrain
from metamask_plugin.cli.pretrain import torch_flags_kept
from metamask_plugin.methods import ICLMSR, Baseline, MetaMask
from metamask_plugin.tasks import TASKS

ROOT = Path(__file__).resolve().parents[2]
METHODS = {
    "bare": (Baseline, baseline_config),
    "metamask": (MetaMask, method_config),
    "icl_msr": (ICLMSR, icl_msr_config),
}


def digest(state):
    """Of all tensors of a state dict, by name."""
    hashed = hashlib.sha256()
    for name in sorted(state):
        hashed.update(name.encode() + state[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def trained(method, task, seed=0, steps=2):
    """The digest of what a short training leaves: weights, buffers, queues, mask or f_msr."""
    with torch_flags_kept():
        pl.seed_everything(seed)
        constructor, settings = METHODS[method]
        model = constructor(settings(backbone__kwargs={"width": 8}, **task_settings(task)))
        train(model, steps=steps, original=method == "icl_msr", deterministic=True)
        return digest(model.state_dict())


def all_digests():
    return {f"{method} {task}": trained(method, task) for method in METHODS for task in TASKS}


@pytest.fixture(scope="module")
def first_pass():
    return all_digests()


@pytest.mark.fault("determinism")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_a_second_training_in_the_same_process_is_bit_identical(first_pass, method, task):
    # in between all the others have been trained
    assert trained(method, task) == first_pass[f"{method} {task}"]


def test_another_seed_is_another_training(first_pass):
    assert trained("metamask", "simclr", seed=1) != first_pass["metamask simclr"]


def run_apart(folder, text, **environment):
    """Runs a script in a process of its own."""
    script = folder / "script.py"
    script.write_text(text)
    env = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, str(script)]
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=env)


ANOTHER_PROCESS = """
import torch
from test_determinism import all_digests

if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, value in all_digests().items():
        print("digest", name, value)
"""


@pytest.mark.slow
@pytest.mark.fault("determinism")
def test_another_process_with_another_hash_seed_is_bit_identical(tmp_path, first_pass):
    done = run_apart(tmp_path, ANOTHER_PROCESS, PYTHONHASHSEED="4321")
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("digest ")]
    found = {f"{method} {task}": value for _, method, task, value in lines}
    assert found == first_pass, done.stderr[-2000:]


TWO_RANKS_OF_TWO_HASH_SEEDS = """
import os, sys
rank = os.environ.get("LOCAL_RANK", "0")
if os.environ.get("PYTHONHASHSEED") != rank:  # 0 and 1 order the set {"feats", "maps"} differently
    os.environ["PYTHONHASHSEED"] = rank
    os.execv(sys.executable, [sys.executable, *sys.argv])
import lightning.pytorch as pl, torch
from method_config import icl_msr_config
from method_training import train
from metamask_plugin.methods import ICLMSR

if __name__ == "__main__":
    torch.set_num_threads(1)
    pl.seed_everything(0)
    model = ICLMSR(icl_msr_config(method_kwargs__level="feature_map"))
    trainer = train(model, steps=1, original=True, devices=2, strategy="ddp")
    sys.stdout.write(f"trained {trainer.global_step}" + os.linesep)  # one piece: two processes write
"""


@pytest.mark.slow
@pytest.mark.fault("determinism")
def test_processes_exchange_in_one_order_whatever_their_hash_seeds(tmp_path):
    done = run_apart(tmp_path, TWO_RANKS_OF_TWO_HASH_SEEDS)
    assert done.stdout.count("trained 1") == 2, done.stderr[-2000:]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    generator = torch.Generator().manual_seed(0)
    for kind in ("one", "two"):
        (root / kind).mkdir()
        for index in range(16):
            pixels = torch.randint(256, (40, 48, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(root / kind / f"{index}.jpg")
    return root


def pretrained(folder, photographs, *overrides):
    """The weights that two epochs of the command line leave."""
    own = [
        "data.dataset=custom",
        f"++data.train_path={photographs}",
        "++data.fraction=-1",
        "++data.kwargs=null",
    ]
    short = [
        "max_epochs=2",
        "++evaluation.enabled=False",
        "++deterministic=True",
        "auto_resume.enabled=False",
    ]
    run = pretrain.run(config(folder, *own, *short, *overrides))
    return torch.load(run.last_checkpoint, weights_only=True)["state_dict"]


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def torchvision(workers):
    return ["++data.pipeline=torchvision", f"++data.num_workers={workers}"]


PIPELINES = {
    "kornia": ["++data.pipeline=kornia"],
    "torchvision, no worker": torchvision(0),
    "torchvision, 1 worker": torchvision(1),
    "torchvision, 2 workers": torchvision(2),
    "dali": ["++data.format=dali", "++dali.device=cpu", "++data.num_workers=2"],
}


@pytest.mark.fault("determinism")
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_run_repeated_is_bit_identical(tmp_path, photographs, pipeline):
    if pipeline == "dali":
        pytest.importorskip("nvidia.dali", reason="no NVIDIA DALI")
    first = pretrained(tmp_path / "first", photographs, *PIPELINES[pipeline])
    torch.rand(3)  # the global generator is elsewhere
    assert same(first, pretrained(tmp_path / "second", photographs, *PIPELINES[pipeline]))
    assert all(value.isfinite().all() for value in first.values())


def test_the_number_of_workers_is_part_of_what_must_be_the_same(tmp_path, photographs):
    """Torch seeds a worker by its number, and gives it every n-th batch: the views are others."""
    weights = [pretrained(tmp_path / str(n), photographs, *torchvision(n)) for n in (0, 1, 2)]
    assert not same(weights[0], weights[1]) and not same(weights[1], weights[2])


@pytest.mark.fault("determinism")
def test_deterministic_is_handed_on_and_leaves_nothing_behind(tmp_path, photographs, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    during = []
    plain = MetaMask.on_train_start

    def spy(self):
        during.append(torch.are_deterministic_algorithms_enabled())
        plain(self)

    monkeypatch.setattr(MetaMask, "on_train_start", spy)
    pretrained(tmp_path, photographs)
    assert during == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.deterministic
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
