"""A disk that fills up while a run writes: one line, and the run goes on from its last checkpoint."""

import contextlib
import resource
import shutil
import signal
import subprocess

import pytest
from killed_runs import assert_same, config, in_step, kill_myself, read, rows, run_apart, run_folder
from test_resume_exactly import when_saving


def limited_to(size):
    """From now on this process can write no file beyond ``size`` bytes: the system's write fails."""
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def said(log):
    """The lines of a run's log that are an error; there must be no traceback."""
    text = log.read_text()
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    runs = tmp_path_factory.mktemp("whole")
    assert run_apart(config(runs)) == 0
    return run_folder(runs)


FULL = {
    "at a checkpoint": when_saving(2, limited_to(100_000)),
    "at the metrics": in_step(6, limited_to(100)),
    "at the last epoch": when_saving(3, limited_to(100_000)),
}


@pytest.mark.fault("data")
@pytest.mark.parametrize("moment", FULL)
def test_no_file_can_grow(tmp_path, whole, moment):
    cfg = config(tmp_path)
    assert run_apart(cfg.copy(), FULL[moment], tmp_path / "log.txt") == 2
    (line,) = said(tmp_path / "log.txt")
    assert "File too large" in line and "the same command goes on" in line
    folder = run_folder(tmp_path)
    assert read(folder / "last.ckpt")["global_step"] in (4, 8)
    assert [path.name for path in folder.glob(".*")] == [".lock"]
    assert run_apart(cfg.copy()) == 0
    assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))
    assert rows(folder) == rows(whole)


@contextlib.contextmanager
def small_disk(path, size):
    """A file system of its own, if this machine lets us make one."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path], capture_output=True)
    if made.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield path
    finally:
        subprocess.run(["umount", path], check=True)


@pytest.mark.fault("data")
def test_a_disk_that_is_full(tmp_path, whole):
    """Room for one checkpoint and a half; then more room."""
    size = int((whole / "last.ckpt").stat().st_size * 1.7)
    with small_disk(tmp_path / "disk", size) as disk:
        cfg = config(disk)
        assert run_apart(cfg.copy(), None, tmp_path / "log.txt") == 2
        (line,) = said(tmp_path / "log.txt")
        assert "No space left on device" in line and "free space" in line
        folder = run_folder(disk)
        assert read(folder / "last.ckpt")["global_step"] == 4
        subprocess.run(["mount", "-o", f"remount,size={size * 10}", disk], check=True)
        assert run_apart(cfg.copy()) == 0
        assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))


@pytest.mark.fault("resume")
def test_a_copy_that_was_cut_while_it_was_made(tmp_path, whole):
    """The run's folder was copied to another machine, and the copy ended early."""
    cfg = config(tmp_path)
    assert run_apart(cfg.copy(), in_step(10, kill_myself)) == -signal.SIGKILL
    folder = run_folder(tmp_path)
    content = (folder / "last.ckpt").read_bytes()
    shutil.copy(folder / "last.ckpt", folder / "previous.ckpt")
    (folder / "last.ckpt").write_bytes(content[: len(content) // 3])
    assert run_apart(cfg.copy()) == 0
    assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))
