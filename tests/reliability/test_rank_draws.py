"""Several processes: the same weights, other augmentations, and the same again after an interruption."""

import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from composing import PATHS
from killed_runs import assert_same, read, run_folder
from PIL import Image

SOURCE = "huggingface/transformers#37932, facebookresearch/deit#150, Lightning-AI/pytorch-lightning#16166"

SCRIPT = """
import json, sys, torch
from pathlib import Path
from killed_runs import config, signal_myself
from metamask_plugin.cli import pretrain
from metamask_plugin.methods.base import TaskMethod

runs, images, step, *overrides = sys.argv[1:]
plain = TaskMethod.training_step

def training_step(self, batch, batch_idx):
    weights = float(sum(p.double().abs().sum() for p in self.parameters()))
    views = [round(float(image.double().sum()), 3) for image in batch[1][0]]
    record = {"step": self.trainer.global_step, "weights": weights, "views": views}
    with Path(runs, f"rank{self.global_rank}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\\n")
    if self.trainer.global_step == int(step) and self.global_rank == 1:
        signal_myself(15)
    return plain(self, batch, batch_idx)

if __name__ == "__main__":
    torch.set_num_threads(1)
    TaskMethod.training_step = training_step
    data = ["data.dataset=custom", f"++data.train_path={images}", "++data.fraction=-1", "++data.kwargs=null"]
    cfg = config(runs, *data, "strategy=ddp", "max_epochs=2", "optimizer.batch_size=4", *overrides)
    pretrain.run(cfg)
"""

PIPELINES = {
    "kornia": ["++data.pipeline=kornia"],
    "torchvision": ["++data.pipeline=torchvision", "data.num_workers=0"],
    "workers": ["++data.pipeline=torchvision", "data.num_workers=1"],
}


@pytest.fixture(scope="module")
def one_picture(tmp_path_factory):
    """A folder of images that are all the same: their views differ by what is drawn alone."""
    folder = tmp_path_factory.mktemp("images")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (36, 36, 3), dtype=np.uint8))
    for kind in ("one", "two"):
        (folder / kind).mkdir()
        for index in range(12):
            picture.save(folder / kind / f"{index}.png")
    return folder


def train(runs, images, overrides, processes, step=-1):
    runs.mkdir(exist_ok=True)
    script = runs / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, script, runs, images, str(step), f"devices={processes}", *overrides]
    environment = {**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    return ended.returncode, ended.stdout + ended.stderr


def seen(runs, rank):
    return [json.loads(line) for line in (runs / f"rank{rank}.jsonl").read_text().splitlines()]


def assert_drawn_apart(runs, processes):
    ranks = [seen(runs, rank) for rank in range(processes)]
    for records in zip(*ranks, strict=True):
        assert len({record["weights"] for record in records}) == 1
        everything = [view for record in records for view in record["views"]]
        assert len(set(everything)) > len(everything) * 0.8, records
    for records in ranks:  # no epoch draws again what the one before it drew
        steps = len(records) // 2
        assert all(records[i]["views"] != records[i + steps]["views"] for i in range(steps))


@pytest.mark.fault("determinism", source=SOURCE)
@pytest.mark.parametrize(
    ("pipeline", "processes"),
    [
        ("kornia", 2),
        *(pytest.param(name, 2, marks=pytest.mark.slow) for name in ("torchvision", "workers")),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in PIPELINES),
    ],
)
def test_ranks_agree_in_weights_and_differ_in_draws(tmp_path, one_picture, pipeline, processes):
    code, said = train(tmp_path, one_picture, PIPELINES[pipeline], processes)
    assert code == 0, said[-3000:]
    assert_drawn_apart(tmp_path, processes)


@pytest.mark.slow
@pytest.mark.fault("resume")
@pytest.mark.parametrize("pipeline", PIPELINES)
@pytest.mark.parametrize("step", [1, 4])
def test_each_rank_goes_on_with_its_draws(tmp_path, one_picture, pipeline, step):
    """Stopped within the first epoch, and within the second, whose seeds are others."""
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert train(whole, one_picture, PIPELINES[pipeline], 2)[0] == 0
    code, said = train(stopped, one_picture, PIPELINES[pipeline], 2, step)
    assert code == 128 + signal.SIGTERM, said[-3000:]
    assert said.count("resume with") == 1 and "Traceback" not in said, said
    code, said = train(stopped, one_picture, PIPELINES[pipeline], 2)
    assert code == 0, said[-3000:]
    for rank in range(2):
        assert seen(stopped, rank) == seen(whole, rank)
    found, expected = (read(run_folder(runs) / "last.ckpt") for runs in (stopped, whole))
    for key in ("state_dict", "optimizer_states", "rng"):
        assert_same(found[key], expected[key])
