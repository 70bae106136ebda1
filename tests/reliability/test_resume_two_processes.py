"""Two processes that train together are stopped together, and go on as if nothing had happened."""

import os
import signal
import subprocess
import sys

import pytest
from composing import PATHS
from killed_runs import assert_same, read, rows, run_folder

SCRIPT = """
import sys, torch
from killed_runs import config, kill_myself, signal_myself
from metamask_plugin.cli import pretrain
from metamask_plugin.methods.base import TaskMethod

runs, rank, number, *overrides = sys.argv[1:]
plain = TaskMethod.on_train_batch_end

def on_train_batch_end(self, outputs, batch, batch_idx):
    if str(self.trainer.global_rank) == rank and self.trainer.global_step == 3:
        signal_myself(int(number))
    plain(self, outputs, batch, batch_idx)

if __name__ == "__main__":
    torch.set_num_threads(1)
    TaskMethod.on_train_batch_end = on_train_batch_end
    pretrain.run(config(runs, "devices=2", "strategy=ddp", "optimizer.batch_size=16", *overrides))
"""


def train(runs, rank="none", number=0, *overrides):
    script = runs / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(runs), rank, str(int(number)), *overrides]
    environment = {**os.environ, "PYTHONPATH": PATHS}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.slow
@pytest.mark.fault("resume")
@pytest.mark.parametrize("rank", ["0", "1"])
@pytest.mark.parametrize("pipeline", ["kornia", "torchvision"])
def test_whichever_process_is_told_both_stop_and_go_on(tmp_path, rank, pipeline):
    """Each has random numbers of its own, which one checkpoint holds."""
    overrides = [f"++data.pipeline={pipeline}"]
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    for runs in (whole, stopped):
        runs.mkdir()
    assert train(whole, "none", 0, *overrides).returncode == 0
    first = train(stopped, rank, signal.SIGTERM, *overrides)
    assert first.returncode == 128 + signal.SIGTERM, first.stderr
    assert "Traceback" not in first.stderr and "SIGTERM in epoch 1 of 3" in first.stdout
    saved = read(run_folder(stopped) / "last.ckpt")
    assert saved["batches_done"] == 3 and len(saved["rng"]) == 2
    second = train(stopped, "none", 0, *overrides)
    assert second.returncode == 0, second.stderr
    assert_same(read(run_folder(stopped) / "last.ckpt"), read(run_folder(whole) / "last.ckpt"))
    assert rows(run_folder(stopped)) == rows(run_folder(whole))


@pytest.mark.slow
@pytest.mark.fault("processes")
def test_all_processes_of_a_fresh_attempt_share_one_folder(tmp_path):
    assert train(tmp_path, "none", 0, "max_epochs=1").returncode == 0
    again = train(tmp_path, "none", 0, "max_epochs=1", "auto_resume.enabled=False")
    assert again.returncode == 0, again.stderr
    folders = sorted(path.name for path in (tmp_path / "metamask").iterdir())
    assert len(folders) == 2 and folders[1] == f"{folders[0]}-2"
    assert {path.name for path in tmp_path.glob("*/*/last.ckpt")} == {"last.ckpt"}
