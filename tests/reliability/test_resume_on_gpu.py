"""A run on a GPU that was killed goes on as if nothing had happened."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from composing import PATHS
from killed_runs import assert_same, read, rows, run_folder

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRAINING = """
import sys
from killed_runs import config, in_step, kill_myself
from metamask_plugin.cli import pretrain

runs, step, *overrides = sys.argv[1:]
if step != "never":
    in_step(int(step), kill_myself)()
pretrain.run(config(runs, "accelerator=gpu", "++deterministic=True", *overrides))
"""
SETTINGS = {
    "float32": (),
    "bfloat16, captured": (
        "precision=bf16-mixed",
        "++method_kwargs.meta.precision=bf16",
        "++performance.cuda_graph=True",
    ),
    "float16": ("precision=16-mixed",),
}


def train(runs, step, overrides):
    """In a process of its own, which a killed one must be, and each that begins with a fresh device."""
    command = [sys.executable, "-W", "ignore", "-c", TRAINING, str(runs), str(step), *overrides]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True, timeout=300
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.fault("resume")
@pytest.mark.parametrize("setting", SETTINGS)
def test_killed_in_the_middle_of_an_epoch(tmp_path, setting):
    """Bit by bit, as on a CPU, with deterministic algorithms."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    overrides = ["++checkpoint.every_n_steps=1", *SETTINGS[setting]]
    code, said = train(whole, "never", overrides)
    assert code == 0, said
    code, said = train(killed, 7, overrides)
    assert code == -signal.SIGKILL, said
    assert read(run_folder(killed) / "last.ckpt")["global_step"] == 6
    code, said = train(killed, "never", overrides)
    assert code == 0 and "resuming" in said, said
    assert_same(read(run_folder(killed) / "last.ckpt"), read(run_folder(whole) / "last.ckpt"))
    assert rows(run_folder(killed)) == rows(run_folder(whole))
