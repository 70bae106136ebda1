"""Processes that die: ranks and workers, really killed. One line says which, nothing is left behind."""

import gc
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from composing import PATHS, tiny
from PIL import Image

from metamask_plugin.cli import pretrain
from metamask_plugin.data.workers import worker_failure
from metamask_plugin.errors import UserError
from metamask_plugin.training.callbacks import Progress
from metamask_plugin.training.ranks import with_timeout

ROOT = Path(__file__).resolve().parents[2]
LIMIT_SECONDS = 60
"""Within which all processes have ended once one has."""

TWO_RANKS = """
import os, signal, sys, time
from pathlib import Path
import torch
from test_processes import config
from metamask_plugin.cli import pretrain
from metamask_plugin.errors import UserError
from metamask_plugin.training.callbacks import Progress

folder, ranks, fault, *overrides = sys.argv[1:]
plain = Progress.on_train_batch_end

def faulty(self, trainer, *args):
    plain(self, trainer, *args)
    Path(folder, f"pid{trainer.global_rank}").write_text(str(os.getpid()))
    if str(trainer.global_rank) in ranks and trainer.global_step == 5:
        Path(folder, "began").write_text(str(time.time()))
        if fault == "raise":
            raise ValueError("injected")
        if fault == "say":
            raise UserError("this.key must be right, got 'wrong'")
        os.kill(os.getpid(), getattr(signal, fault))

if __name__ == "__main__":
    torch.set_num_threads(1)
    Progress.on_train_batch_end = faulty
    pretrain.run(config(folder, "devices=2", "strategy=ddp", "++evaluation.enabled=False", *overrides))
"""


def config(folder, *overrides, name="metamask_barlow"):
    """Epochs of four batches a rank, of two; `data.num_workers` counts with `data.pipeline=torchvision`."""
    return tiny(folder, "optimizer.batch_size=16", "max_epochs=500", *overrides, name=name)


def end_two_ranks(folder, ranks, fault, *overrides):
    """Runs two ranks until a fault ends them: rank 0's exit code, what both said, seconds since the fault."""
    script = folder / "two_ranks.py"
    script.write_text(TWO_RANKS)
    process = subprocess.Popen(
        [sys.executable, str(script), str(folder), ranks, fault, *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": PATHS, "OMP_NUM_THREADS": "1"},
    )
    said, _ = process.communicate(timeout=240)  # until the last of both closes the pipe
    assert (folder / "began").exists(), said[-2000:]
    return process.returncode, said, time.time() - float((folder / "began").read_text())


def rank_is_gone(folder, rank):
    """Whether the process that was this rank runs no longer; a zombie of another parent's does not either."""
    stat = Path(f"/proc/{(folder / f'pid{rank}').read_text()}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def errors_in(said):
    lines = said.replace("\0", "").splitlines()  # torch ends a worker's last words with one
    return [line for line in lines if line.startswith("error: ")]


@pytest.mark.fault("processes")
@pytest.mark.parametrize(
    ("rank", "fault", "expected", "code", "traceback"),
    [
        (
            "1",
            "SIGKILL",
            r"error: rank 1 \(pid \d+\) was killed by SIGKILL \(exit code -9\), .*; resume",
            2,
            False,
        ),
        pytest.param(
            *("0", "SIGKILL", r"error: rank 0 \(pid \d+\) is gone, killed .*; resume", -9, False),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("1", "SIGSEGV", r"error: rank 1 \(pid \d+\) was killed by SIGSEGV", 2, False),
            marks=pytest.mark.slow,
        ),
        # a mistake in the code: its traceback, the failing rank's, and no other
        pytest.param(
            *(
                "1",
                "raise",
                r"error: rank 1 \(pid \d+\) ended with exit code 1, its message is above",
                2,
                True,
            ),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("0", "raise", None, 1, True), marks=pytest.mark.slow),
        pytest.param(*("1", "say", r"error: this\.key must be right", 2, False), marks=pytest.mark.slow),
        pytest.param(*("0", "say", r"error: this\.key must be right", 2, False), marks=pytest.mark.slow),
        pytest.param(*("01", "say", r"error: this\.key must be right", 2, False), marks=pytest.mark.slow),
    ],
)
def test_one_rank_dying_ends_all_with_its_message(tmp_path, rank, fault, expected, code, traceback):
    returned, said, seconds = end_two_ranks(tmp_path, rank, fault)
    errors = errors_in(said)
    if expected is None:
        assert errors == []
    else:
        assert len(errors) == 1 and re.match(expected, errors[0]), said[-3000:]
    assert said.count("Traceback (most recent call last)") <= int(traceback) * 2, said[-3000:]
    assert "gloo" not in said, said[-3000:]
    assert returned == code
    assert seconds < LIMIT_SECONDS
    assert rank_is_gone(tmp_path, 0) and rank_is_gone(tmp_path, 1)


@pytest.mark.slow
@pytest.mark.fault("processes")
def test_a_rank_that_hangs_is_named_after_the_timeout(tmp_path):
    timeout = 60  # in which a second process is up, too, on a busy machine
    returned, said, seconds = end_two_ranks(tmp_path, "1", "SIGSTOP", f"++process_timeout={timeout}")
    assert len(errors_in(said)) == 1, said[-3000:]
    (error,) = errors_in(said)
    assert re.search(r"rank 1 \(pid \d+\) is stopped; resume with", error), said[-3000:]
    assert "Traceback" not in said, said[-3000:]
    assert returned == 2
    assert timeout - 1 < seconds < timeout + LIMIT_SECONDS
    assert rank_is_gone(tmp_path, 0) and rank_is_gone(tmp_path, 1)


@pytest.mark.fault("processes")
@pytest.mark.parametrize("seconds", [0, -1, "soon", True])
def test_a_timeout_that_is_none_is_refused(seconds):
    with pytest.raises(UserError, match="process_timeout must be a number of seconds > 0"):
        with_timeout("ddp", seconds)


def test_a_timeout_reaches_the_process_group():
    assert with_timeout("auto", None) == "auto"
    strategy = with_timeout("ddp_find_unused_parameters_true", 40)
    assert strategy._timeout.total_seconds() == 40
    assert strategy._ddp_kwargs["find_unused_parameters"] is True
    with pytest.raises(UserError, match="null with strategy='single_device'"):
        with_timeout("single_device", 40)


def no_child_is_left(ended):
    """Once the exception, which holds the frames of the training, is let go of."""
    ended.value.__context__ = None
    ended.value.__traceback__ = None
    ended._excinfo = None
    gc.collect()
    until = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.1)
    return not multiprocessing.active_children()


WORKERS = ["++data.pipeline=torchvision", "++data.num_workers=2", "++evaluation.enabled=False"]


def kill_a_worker(monkeypatch, number, step):
    """One of the workers gets the signal while the batch of ``step`` is in the making."""
    plain, killed = Progress.on_train_batch_end, []

    def faulty(self, trainer, *args):
        plain(self, trainer, *args)
        if trainer.global_step == step:
            worker = multiprocessing.active_children()[0]
            killed.append(worker.pid)
            os.kill(worker.pid, number)

    monkeypatch.setattr(Progress, "on_train_batch_end", faulty)
    return killed


@pytest.mark.fault("processes")
@pytest.mark.parametrize(
    "number",
    [signal.SIGKILL, pytest.param(signal.SIGBUS, marks=pytest.mark.slow)],
    ids=lambda number: number.name,
)
def test_a_killed_worker_is_reported_and_the_run_goes_on(tmp_path, monkeypatch, capfd, number):
    cfg = config(tmp_path, *WORKERS, "auto_resume.enabled=True", "max_epochs=3")
    step = 11  # in the second epoch
    with monkeypatch.context() as patch:
        killed = kill_a_worker(patch, number, step)
        with pytest.raises(SystemExit) as ended:
            pretrain.run(cfg.copy())
    said = capfd.readouterr()
    assert ended.value.code == 2
    (error,) = errors_in(said.err)
    # by torch's handler of SIGCHLD, or, where that is not in place any more, by who waits for the batch
    assert re.search(rf"\(pid {killed[0]}\) (was killed|ended unexpectedly)", error)
    assert "data.num_workers" in error and "/dev/shm" in error
    assert "Traceback" not in said.err
    assert no_child_is_left(ended)

    resumed = pretrain.run(cfg)
    assert "resuming" in capfd.readouterr().out
    state = torch.load(resumed.last_checkpoint, weights_only=True)
    assert state["epoch"] == 2 and state["global_step"] > step


def test_other_errors_are_not_taken_for_a_workers_death():
    assert worker_failure(RuntimeError("shape mismatch")) is None
    assert worker_failure(ValueError("DataLoader worker (pid 1) is killed by signal: Killed. ")) is None
    said = str(worker_failure(RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly")))
    assert said.startswith("a worker that reads images (pid 7, 8) ended unexpectedly")


@pytest.mark.fault("processes")
def test_a_worker_that_meets_a_broken_image_says_so_in_one_line(tmp_path, capfd):
    for kind in ("one", "two"):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for index in range(16):
            Image.new("RGB", (40, 40), (index, 3 * index, 9)).save(
                tmp_path / "images" / kind / f"{index}.jpg"
            )
    broken = tmp_path / "images" / "two" / "5.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    own = [
        "data.dataset=custom",
        f"++data.train_path={tmp_path / 'images'}",
        "++data.fraction=-1",
        "++data.kwargs=null",
    ]
    with pytest.raises(SystemExit) as ended:
        pretrain.run(config(tmp_path / "runs", *WORKERS, *own, "max_epochs=2"))
    said = capfd.readouterr()
    assert ended.value.code == 2
    (error,) = errors_in(said.err)
    assert str(broken) in error
    assert "Traceback" not in said.err
    assert no_child_is_left(ended)
