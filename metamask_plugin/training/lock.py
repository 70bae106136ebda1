"""Gives a folder to one process at a time."""

import contextlib
import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from metamask_plugin.errors import UserError
from metamask_plugin.retry import retried

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
POLL_SECONDS = 0.5
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without locks answer."""

_held: set[int] = set()


class FolderLocked(UserError):
    """Another process writes into the folder.

    Attributes:
        folder: the folder.
        what: its name in messages, e.g. ``"the run folder"``.
    """

    def __init__(self, folder: Path, what: str):
        super().__init__(
            f"{what} {folder} must be used by one process at a time, is being written by "
            f"{_owner(folder / NAME)}; wait for it, or end it"
        )
        self.folder, self.what = folder, what


@contextlib.contextmanager
def locked(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, which is made where it is missing.

    The kernel releases the lock when the process ends, whatever ends it. Only rank 0 locks: the other ranks
    of a run share its folder. The lock is not re-entrant.

    Args:
        folder: the folder; its file ``.lock`` names the process that holds it and stays there afterwards.
        what: the folder's name in messages, e.g. ``"the run folder"``.
        wait: whether to wait for the other process, after a note.

    Raises:
        FolderLocked: another process holds the lock, and ``wait`` is False.
    """
    if fcntl is None or _rank() > 0:
        yield
        return
    made = _make(folder)
    handle = _opened(folder)
    _held.add(handle)
    try:
        while _acquired(handle, folder, what, wait):
            if _is_current(handle, folder):
                _sign(handle)
                break
            made = _make(folder)  # whoever held the lock has removed the folder, as below
            current = _opened(folder)
            os.dup2(current, handle, inheritable=False)
            os.close(current)
        yield
    finally:
        if handle in _held:  # else this is a forked child, which closed it
            _remove_if_empty(folder, made)
            _held.discard(handle)
            with contextlib.suppress(OSError):  # before closing: a child that is being forked has a copy
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _make(folder: Path) -> list[Path]:
    """Makes a folder; returns those that were missing on the way, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError) as error:  # below /proc, say, or a file
        raise UserError(
            f"a folder must be one that can be made, got {str(folder)!r} ({error.strerror}); set another "
            "checkpoint.dir"
        ) from error
    return missing


def _remove_if_empty(folder: Path, made: list[Path]) -> None:
    """Removes the folders that were made for the lock, where nothing came of it."""
    with contextlib.suppress(OSError):
        if made and os.listdir(folder) == [NAME]:
            (folder / NAME).unlink()
            for path in made:
                path.rmdir()


def _opened(folder: Path) -> int:
    return retried(lambda: os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666))


def _is_current(handle: int, folder: Path) -> bool:
    """Whether the lock file is still the one in the folder."""
    try:
        return os.fstat(handle).st_ino == os.stat(folder / NAME).st_ino
    except FileNotFoundError:
        return False


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder / NAME, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(handle)


def _acquired(handle: int, folder: Path, what: str, wait: bool) -> bool:
    """Whether the lock is held now; False where the file system has no locks."""
    tries, said = 0, False
    while True:
        tries += 1
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(
                    f"warning: {folder} cannot be locked ({os.strerror(error.errno)}): start no second "
                    "process that writes there",
                    file=sys.stderr,
                )
                return False
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        if tries == 1:
            time.sleep(0.05)  # it may be somebody who only looked, see is_locked
            continue
        if not wait:
            raise FolderLocked(folder, what)
        if not said:
            print(f"note: waiting for {_owner(folder / NAME)}, which writes {what} {folder}", flush=True)
            said = True
        time.sleep(POLL_SECONDS)  # and not a blocking call: a signal's handler must be able to end it


def _sign(handle: int) -> None:
    """Names this process in the lock file; only messages read it, so a failure does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _owner(file: Path) -> str:
    try:
        pid, host = file.read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def _rank() -> int:
    """This process's rank; before Lightning has launched several nodes, the node's."""
    node = os.environ.get("NODE_RANK", "0")
    return rank_zero_only.rank or (int(node) if node.isdigit() else 0)


def _leave_to_parent() -> None:
    """A forked child, e.g. a loader's worker, must not keep the lock when its parent has ended."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
