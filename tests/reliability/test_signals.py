"""Signals to one or all processes of a job, workers included: what is saved, and how the run ends."""

import ast
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_runs import ROOT, config, read, run_apart, run_folder
from PIL import Image
from torch.utils.data import Dataset

from metamask_plugin import signals
from metamask_plugin.data import verify
from metamask_plugin.data import workers as loader_module
from metamask_plugin.data.splits import FileImages
from metamask_plugin.data.workers import ShieldedLoader, worker_failure
from metamask_plugin.signals import SIGNALS, Preempted, install, restore
from metamask_plugin.training import callbacks, report
from metamask_plugin.training.callbacks import Progress

REPORT = "KempnerInstitute/KempnerForge#177, EgoVerse#621"


def signal_all(number):
    """To every process of this one's group; not from this one, whose own SIGTERM ends its workers."""
    subprocess.run(["kill", f"-{int(number)}", "--", f"-{os.getpgrp()}"])


def in_a_group(fault, method="fork"):
    """The fault, in a process group of its own."""

    def begin():
        os.setsid()
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
        multiprocessing.set_start_method(method, force=True)
        fault()

    return begin


def at_step(step, act):
    plain = Progress.on_train_batch_end

    def on_train_batch_end(self, trainer, *args):
        plain(self, trainer, *args)
        if trainer.global_step == step:
            act()

    def patch():
        Progress.on_train_batch_end = on_train_batch_end

    return patch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind in ("one", "two"):
            (root / split / kind).mkdir(parents=True)
            for index in range(16):
                pixels = generator.integers(0, 255, (36, 36, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / kind / f"{index}.png")
    return root


def of_files(images, runs, *overrides):
    """Two epochs of two batches of image files, evaluated after each."""
    return config(
        runs,
        "data.dataset=custom",
        f"++data.train_path={images / 'train'}",
        f"++data.val_path={images / 'val'}",
        "++data.fraction=-1",
        "++data.kwargs=null",
        "optimizer.batch_size=16",
        "max_epochs=2",
        "++evaluation.enabled=True",
        "evaluation.knn.k=[1]",
        "evaluation.knn.every_n_epochs=1",
        "++evaluation.linear.protocol=fast",
        *overrides,
    )


QUICK = (signal.SIGTERM, signal.SIGHUP)
"""What the test command sends to a whole job; the slow tests send the others, too."""


def workers(count):
    return ["++data.pipeline=torchvision", f"++data.num_workers={count}"]


@pytest.mark.fault("processes", source=REPORT)
@pytest.mark.parametrize(
    ("number", "count", "method"),
    [
        pytest.param(
            *(number, count, method),
            id=f"{number.name}-{count}-{method}",
            marks=() if number in QUICK and (count, method) == (2, "fork") else pytest.mark.slow,
        )
        for number in SIGNALS
        for count, method in ((2, "fork"), (0, "fork"), (2, "forkserver"))
    ],
)
def test_a_signal_to_all_processes_saves_within_the_epoch(tmp_path, number, count, method):
    cfg = config(tmp_path, *workers(count))
    fault = in_a_group(at_step(6, lambda: signal_all(number)), method)
    assert run_apart(cfg, fault, tmp_path / "log.txt") == 128 + number
    said = (tmp_path / "log.txt").read_text()
    assert f"{number.name} in epoch 2 of 3; resume with" in said
    assert said.count(number.name) == 2, said  # not once more by each worker
    assert "memory" not in said and "Traceback" not in said, said
    saved = read(run_folder(tmp_path) / "last.ckpt")
    assert saved["global_step"] >= 6 and saved["batches_done"] == saved["global_step"] - 4


def while_evaluating(number):
    """Between the batches of the first epoch's kNN evaluation, which its own workers read."""
    plain = callbacks.extract_features

    def extract_features(backbone, loader, *args, **kwargs):
        def batches():
            for batch in loader:
                signal_all(number)
                yield batch

        return plain(backbone, batches(), *args, **kwargs)

    callbacks.extract_features = extract_features


@pytest.mark.fault("processes", source=REPORT)
@pytest.mark.parametrize(
    ("number", "method"),
    [
        (signal.SIGTERM, "fork"),
        pytest.param(signal.SIGTERM, "forkserver", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "fork", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, "fork", marks=pytest.mark.slow),
    ],
)
def test_a_signal_during_an_epochs_evaluation_keeps_the_epoch(tmp_path, images, number, method):
    cfg = of_files(images, tmp_path, *workers(2), "checkpoint.frequency=2")
    fault = in_a_group(lambda: while_evaluating(number), method)
    assert run_apart(cfg, fault, tmp_path / "log.txt") == 128 + number
    said = (tmp_path / "log.txt").read_text()
    assert re.search(rf"{number.name} in epoch \d of 2; resume with", said), said
    assert "memory" not in said and "Traceback" not in said, said
    assert read(run_folder(tmp_path) / "last.ckpt")["global_step"] in (2, 3)  # maybe one batch on


@pytest.mark.fault("processes")
def test_a_signal_during_the_last_evaluation_leaves_the_report_to_the_next_start(tmp_path, images):
    cfg = of_files(images, tmp_path, *workers(2), "max_epochs=1")
    fault = in_a_group(lambda: while_evaluating(signal.SIGTERM))
    assert run_apart(cfg.copy(), fault, tmp_path / "log.txt") == 128 + signal.SIGTERM
    assert "SIGTERM in epoch 1 of 1; resume with" in (tmp_path / "log.txt").read_text()
    assert not (run_folder(tmp_path) / "summary.json").exists()
    assert run_apart(cfg) == 0
    assert (run_folder(tmp_path) / "summary.json").exists()


def once(act, owner, name):
    """Patches a function, which then acts before its first call."""
    plain, acted = getattr(owner, name), []

    def patched(*args, **kwargs):
        if not acted:
            acted.append(act())
        return plain(*args, **kwargs)

    return lambda: setattr(owner, name, patched)


PLACES = {
    "verifying": (verify, "fault", workers(2)),
    "decoding": (FileImages, "image", ["++data.pipeline=kornia"]),
    "reporting": (report, "evaluate_rows", workers(2)),
}


@pytest.mark.fault("processes")
@pytest.mark.parametrize(
    ("place", "number"),
    [
        *((place, signal.SIGINT) for place in PLACES),
        *(pytest.param(place, signal.SIGTERM, marks=pytest.mark.slow) for place in PLACES),
    ],
)
def test_a_signal_outside_the_training_ends_with_one_line(tmp_path, images, place, number):
    owner, name, overrides = PLACES[place]
    cfg = of_files(images, tmp_path, *overrides, "max_epochs=1")
    fault = in_a_group(once(lambda: signal_all(number), owner, name))
    assert run_apart(cfg.copy(), fault, tmp_path / "log.txt") == 128 + number
    said = (tmp_path / "log.txt").read_text()
    assert f"{number.name}: interrupted; start it again with the same command" in said
    assert "Traceback" not in said and "error" not in said, said


class Slow(Dataset):
    """One item that says where it is, and takes a while."""

    def __init__(self, folder):
        self.folder = folder

    def __len__(self):
        return 64

    def __getitem__(self, index):
        (self.folder / f"pid{os.getpid()}").touch()
        time.sleep(0.2)
        return index


def pids(folder):
    until = time.monotonic() + 20
    while len(list(folder.glob("pid*"))) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    return [int(path.name.removeprefix("pid")) for path in folder.glob("pid*")]


def are_gone(found, seconds):
    until = time.monotonic() + seconds
    while any(Path(f"/proc/{pid}").exists() for pid in found) and time.monotonic() < until:
        time.sleep(0.05)
    return not any(Path(f"/proc/{pid}").exists() for pid in found)


@pytest.mark.fault("processes", source="KempnerInstitute/KempnerForge#203")
def test_a_worker_ends_by_its_parents_sigterm_and_by_nobody_elses(tmp_path):
    batches = iter(ShieldedLoader(Slow(tmp_path), 2, num_workers=2))
    next(batches)
    batches = batches.gi_yieldfrom  # torch's own iterator
    found = pids(tmp_path)
    for number in SIGNALS:
        for pid in found:
            subprocess.run(["kill", f"-{int(number)}", str(pid)])
    time.sleep(0.3)
    assert all(worker.is_alive() for worker in batches._workers)
    next(batches)
    torch._C._remove_worker_pids(id(batches))  # their end is no fault here
    batches._worker_pids_set = False
    batches._workers[0].terminate()
    batches._workers[0].join(5)
    assert batches._workers[0].exitcode == 0
    assert batches._workers[1].is_alive()


@pytest.mark.fault("processes", source="KempnerInstitute/KempnerForge#203")
@pytest.mark.parametrize(
    "ending",
    [
        lambda: sys.exit(3),
        pytest.param(lambda: os.kill(os.getpid(), signal.SIGKILL), marks=pytest.mark.slow),
    ],
    ids=["exit", "SIGKILL"],
)
def test_workers_never_outlive_the_main_process_nor_keep_it(tmp_path, ending):
    """An iterator that nobody has shut down is what hangs at exit if workers ignore every SIGTERM."""

    def main():
        batches = iter(ShieldedLoader(Slow(tmp_path), 2, num_workers=2))
        next(batches)
        pids(tmp_path)
        ending()

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    process.join(30)
    assert process.exitcode in (3, -signal.SIGKILL)
    assert are_gone(pids(tmp_path), 15)


def test_every_loader_is_shielded():
    calls = []
    for path in (ROOT / "metamask_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "DataLoader":
                calls.append(path.name)
    assert calls == []


@pytest.mark.fault("processes", source=REPORT)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_worker_that_a_signal_has_ended_is_a_preemption(number):
    """One that was hit before it could shield itself."""
    message = f"DataLoader worker (pid 7) is killed by signal: {signal.strsignal(number)}. "
    failure = worker_failure(RuntimeError(message))
    assert isinstance(failure, Preempted) and failure.exit_code == 128 + number
    assert "memory" in str(worker_failure(RuntimeError(message.replace(signal.strsignal(number), "Killed"))))


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        replaced = install(lambda number, frame: None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        restore(replaced)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.fault("processes")
def test_a_closed_output_does_not_change_how_a_signal_ends_a_command():
    script = (
        "import os, signal\nfrom metamask_plugin.cli.errors import one_line_errors\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "with one_line_errors():\n    os.read(0, 1)\n    os.kill(os.getpid(), signal.SIGHUP)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    process.stdout.close()
    process.stdin.write(b"x")
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(30) == 128 + signal.SIGHUP


@pytest.mark.fault("processes")
def test_a_signal_ends_a_run_whose_batch_does_not_come(tmp_path):
    def stuck():
        signals.BATCH_SECONDS = 1.0
        plain = loader_module.WorkerStart.__call__

        def hang_in_second_epoch(self, worker):
            plain(self, worker)
            if (tmp_path / "first").exists():
                signal_all(signal.SIGUSR1)
                time.sleep(600)

        loader_module.WorkerStart.__call__ = hang_in_second_epoch
        at_step(4, (tmp_path / "first").touch)()

    cfg = config(tmp_path, *workers(1))
    began = time.monotonic()
    assert run_apart(cfg, in_a_group(stuck), tmp_path / "log.txt") == 128 + signal.SIGUSR1
    said = (tmp_path / "log.txt").read_text()
    assert "SIGUSR1 in epoch 2 of 3; resume with" in said and "Traceback" not in said, said
    assert read(run_folder(tmp_path) / "last.ckpt")["global_step"] == 4
    assert time.monotonic() - began < 60


@pytest.mark.fault("processes")
def test_a_folder_in_which_workers_can_make_no_sockets_is_refused(tmp_path):
    far = tmp_path / ("j" * 90)
    far.mkdir()
    cfg = config(tmp_path / "runs", *workers(1))

    def fault():
        import tempfile

        tempfile.tempdir = str(far)
        multiprocessing.process.current_process()._config.pop("tempdir", None)

    assert run_apart(cfg, fault, tmp_path / "log.txt") == 2
    said = (tmp_path / "log.txt").read_text()
    assert re.search(r"^error: TMPDIR must be .*AF_UNIX path too long.* set TMPDIR=/tmp, or", said, re.M), (
        said
    )
    assert not (tmp_path / "runs").exists()
