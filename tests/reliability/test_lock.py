"""One process at a time writes into a folder, whatever ends the one that does."""

import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metamask_plugin import retry
from metamask_plugin.training import run_folder
from metamask_plugin.training.run_folder import FolderLocked, locked

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import sys, time
from pathlib import Path
from metamask_plugin.training.run_folder import locked
with locked(Path(sys.argv[1]), "the run folder"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(folder, seconds=60):
    """Another process that holds the lock of a folder by now."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.fault("processes")
def test_a_second_process_is_refused_and_told_who_writes_and_a_killed_one_leaves_the_lock(tmp_path):
    folder = tmp_path / "run"
    other = holder(folder)
    try:
        expected = rf"the run folder {folder} .* by process {other.pid} on "
        with pytest.raises(FolderLocked, match=expected), locked(folder, "the run folder"):
            raise AssertionError("both hold it")
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
    with locked(folder, "the run folder"):
        assert (folder / ".lock").read_text().split()[0] == str(os.getpid())
    with locked(folder, "the run folder"):
        pass


@pytest.mark.slow
@pytest.mark.fault("processes")
def test_a_process_can_wait_for_the_other_and_says_so_once(tmp_path, capsys):
    other = holder(tmp_path, 1)
    with locked(tmp_path, "the run folder", wait=True):
        pass
    other.communicate()
    (line,) = capsys.readouterr().out.splitlines()
    expected = f"note: waiting for process {other.pid} on {socket.gethostname()}, which writes "
    assert line == f"{expected}the run folder {tmp_path}"


@pytest.mark.fault("processes")
def test_a_forked_worker_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    fork = multiprocessing.get_context("fork")
    stop = fork.Event()
    with locked(tmp_path, "the run folder"):
        worker = fork.Process(target=stop.wait, args=(30,))
        worker.start()
        sleeper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)"])
    try:
        assert worker.is_alive() and sleeper.poll() is None
        with locked(tmp_path, "the run folder"):
            pass
    finally:
        stop.set()
        worker.join()
        sleeper.kill()
        sleeper.wait()


def test_a_file_system_without_locks_is_gone_on_with(tmp_path, monkeypatch, capsys):
    def flock(handle, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, "the run folder"):
        pass
    assert capsys.readouterr().err.startswith(f"warning: {tmp_path} cannot be locked (No locks available)")


def test_other_ranks_do_not_lock(tmp_path, monkeypatch):
    with locked(tmp_path, "the run folder"):
        monkeypatch.setattr(run_folder.rank_zero_only, "rank", 1)
        monkeypatch.setattr(fcntl, "flock", lambda *_: pytest.fail("rank 1 has locked"))
        with locked(tmp_path, "the run folder"):
            assert (tmp_path / run_folder.LOCK).read_text().split()[0] == str(os.getpid())
        monkeypatch.undo()
        assert run_folder.is_locked(tmp_path), "rank 0 holds it still"


def test_a_transient_error_is_tried_again_and_another_is_not(monkeypatch):
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)

    def failing(*codes):
        left = list(codes)

        def action():
            if left:
                raise OSError(left.pop(0), "injected")
            return "done"

        return action

    assert retry.retried(failing(errno.EIO, errno.ESTALE)) == "done"
    assert waits == [0.1, 0.2]
    with pytest.raises(OSError, match="injected"):
        retry.retried(failing(errno.ENOSPC))
    with pytest.raises(OSError, match="injected"):
        retry.retried(failing(*[errno.EBUSY] * 5))
    assert waits == [0.1, 0.2] + [0.1, 0.2, 0.4, 0.8]
