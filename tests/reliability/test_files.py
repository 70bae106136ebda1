"""Small files: whole after a kill or a loss of power, tried again after a hiccup, told when damaged."""

import errno
import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metamask_plugin.evaluation.checkpoints import content_digest
from metamask_plugin.evaluation.files import read_json, remove_unfinished, replacing, write_whole

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def waits(monkeypatch):
    """Nothing waits; the seconds are collected."""
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


def failing_once(function, code):
    """The function, which fails at its first call."""
    left = [code]

    def called(*args, **kwargs):
        if left:
            raise OSError(left.pop(), "injected")
        return function(*args, **kwargs)

    return called


@pytest.mark.fault("data")
@pytest.mark.parametrize(("mask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_a_file_has_the_permissions_that_the_umask_leaves(tmp_path, monkeypatch, mask, mode):
    def refused(*_):
        raise PermissionError(errno.EPERM, "as on CIFS")

    monkeypatch.setattr(os, "chmod", refused)
    before = os.umask(mask)
    try:
        write_whole(tmp_path / "args.json", "{}")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "args.json").stat().st_mode) == mode


@pytest.mark.fault("data")
def test_content_and_name_are_flushed_in_this_order(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    is_folder = lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode)  # noqa: E731
    monkeypatch.setattr(
        os, "fsync", lambda handle: (done.append("folder" if is_folder(handle) else "file"), fsync(handle))
    )
    monkeypatch.setattr(os, "replace", lambda *paths: (done.append("name"), replace(*paths)))
    write_whole(tmp_path / "a.txt", "text\r\n")
    assert done == ["file", "name", "folder"]
    assert (tmp_path / "a.txt").read_bytes() == b"text\r\n"


@pytest.mark.fault("data")
@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EBUSY])
def test_an_error_that_passes_is_tried_again(tmp_path, monkeypatch, waits, call, code):
    monkeypatch.setattr(os, call, failing_once(getattr(os, call), code))
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new" and waits
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.fault("data")
def test_a_rename_that_is_done_and_reported_as_not_done_is_done(tmp_path, monkeypatch):
    replace = os.replace

    def as_nfs(*paths):
        replace(*paths)
        raise FileNotFoundError(errno.ENOENT, "injected")

    monkeypatch.setattr(os, "replace", as_nfs)
    write_whole(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    monkeypatch.setattr(
        os, "replace", lambda temporary, path: os.unlink(temporary) or as_nfs(temporary, path)
    )
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "a.txt", "newer")


@pytest.mark.fault("data")
def test_a_full_disk_names_the_file_and_leaves_the_old_one(tmp_path, monkeypatch):
    write_whole(tmp_path / "a.txt", "old")

    def full(_):
        raise OSError(errno.ENOSPC, "injected")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="injected") as raised:
        write_whole(tmp_path / "a.txt", "new")
    assert raised.value.filename == str(tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]
    monkeypatch.setattr(os, "fsync", failing_once(os.close, errno.EINVAL))  # a file system without fsync
    with replacing(tmp_path / "b.txt") as file:
        file.write(b"b")
    assert (tmp_path / "b.txt").read_bytes() == b"b"


KILLED = """
import os, signal, sys
from pathlib import Path
from metamask_plugin.evaluation.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault("data")
def test_a_killed_process_leaves_the_old_file_and_a_part_that_can_be_removed(tmp_path):
    target = tmp_path / "a.txt"
    write_whole(target, "old")
    done = subprocess.run([sys.executable, "-c", KILLED, str(target)], env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == -signal.SIGKILL
    assert target.read_text() == "old" and len(os.listdir(tmp_path)) == 2
    remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["a.txt"]


def fault_of(content):
    return None if isinstance(content, dict) else "no mapping"


@pytest.mark.fault("data")
@pytest.mark.parametrize(
    "content", [b"", b'{"a": ', b"[]", b"\0" * 64, b"\xff\xfe\xff", b"[" * 100_000, None]
)
def test_a_damaged_file_is_named_moved_aside_and_not_there(tmp_path, capsys, content):
    path = tmp_path / "a.json"
    for number in ("", "-2"):
        path.mkdir() if content is None else path.write_bytes(content)
        assert read_json(path, fault_of, "it is made again") is None
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {path} is damaged (") and line.endswith("; it is made again")
        assert not path.exists() and (tmp_path / f"a.json.unusable{number}").exists()
    assert read_json(path, fault_of, "it is made again") is None
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path, fault_of, "it is made again") == {"a": 1}
    assert capsys.readouterr().err == ""


@pytest.mark.fault("data")
def test_a_file_that_cannot_be_read_for_the_moment_is_not_taken_for_damaged(tmp_path, monkeypatch, waits):
    path = tmp_path / "a.json"
    path.write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", failing_once(Path.read_bytes, errno.ESTALE))
    assert read_json(path, fault_of, "") == {} and waits

    def denied(_):
        raise PermissionError(errno.EACCES, "injected")

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(PermissionError):
        read_json(path, fault_of, "")
    assert path.exists()


def test_a_digest_of_the_content_notices_what_dates_do_not(tmp_path):
    torch = pytest.importorskip("torch")
    first, second = tmp_path / "a.ckpt", tmp_path / "b.ckpt"
    for path, value in ((first, 1.0), (second, 2.0)):
        torch.save({"w": torch.full((3,), value)}, path)
        os.utime(path, (1, 1))
    again = tmp_path / "again" / "a.ckpt"
    again.parent.mkdir()
    again.write_bytes(first.read_bytes())
    assert content_digest(first) != content_digest(second)
    assert content_digest(first) == content_digest(again)
    (tmp_path / "text").write_bytes(b"no archive")
    assert content_digest(tmp_path / "text")
