"""Replaces files at once, so that a path holds the old content or the new one, and reads them back."""

import contextlib
import errno
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from metamask_plugin.retry import retried

UNFINISHED = ".part"
UNUSABLE = ".unusable"
CANNOT_FLUSH = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""What file systems without fsync answer."""


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file at once: a reader finds the old one or the new one, also after a loss of power.

    Args:
        path: the file; its folder is made.
        text: its content, written as UTF-8 with the line ends that it has.

    Raises:
        OSError: with the file's name; errors that often pass are tried again first.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "new" / "table.txt"
        >>> write_whole(path, "knn5  87.2")
        >>> path.read_text()
        'knn5  87.2'
    """

    def write() -> None:
        with replacing(path) as file:
            file.write(text.encode())

    retried(write)


@contextlib.contextmanager
def replacing(path: Path, kept: Path | None = None) -> Iterator[BinaryIO]:
    """Yields a new binary file, which takes the place of ``path`` when the block ends without an error.

    The file lies beside its target under a name that no other process uses. It is flushed to the disk, then
    renamed. After an error it is removed, and the target is as before. A killed process leaves it there, see
    :func:`remove_unfinished`.

    Args:
        path: the target; its folder is made.
        kept: the place for what the target was before; by default that is lost.

    Raises:
        OSError: with the target's name.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "weights.pth"
        >>> with replacing(path) as file:
        ...     _ = file.write(b"numbers")
        >>> path.read_bytes()
        b'numbers'
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}{UNFINISHED}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # mkstemp would hide the file from other users; O_EXCL follows no link that somebody has put there
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(retried(lambda: os.open(temporary, flags, 0o666)), "wb") as file:
            yield file
            file.flush()
            _flush(file.fileno())
            inode = os.fstat(file.fileno()).st_ino
        if kept is not None and path.exists():
            retried(lambda: os.replace(path, kept))
        retried(lambda: _rename(temporary, path, inode))
        flush_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk must not be filled by a file of no use
            temporary.unlink()
        if isinstance(error, OSError) and error.errno and error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _rename(temporary: Path, path: Path, inode: int) -> None:
    try:
        os.replace(temporary, path)
    except FileNotFoundError:
        # NFS says so of a rename that was done, when its answer got lost and the client asked again
        if not path.exists() or path.stat().st_ino != inode:
            raise


def _flush(handle: int) -> None:
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CANNOT_FLUSH:
            raise


def flush_folder(folder: Path) -> None:
    """Flushes a folder's names to the disk, where that is possible."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left of :func:`replacing`; only while no other process writes there."""
    for path in folder.glob(f".*{UNFINISHED}"):
        with contextlib.suppress(OSError):
            path.unlink()


def read_json(path: Path, fault_of: Callable[[Any], str | None], instead: str) -> Any | None:
    """Reads a JSON file that this package has written; None where it is missing or damaged.

    A damaged file is moved aside (``.unusable``), with a warning.

    Args:
        path: the file.
        fault_of: what is wrong with the content, in a few words; None where it is as it was written.
        instead: what is done without the file, for the warning.

    Raises:
        OSError: the file is there and cannot be read, which is not the file's fault.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "record.json"
        >>> write_whole(path, '{"seed": 5}')
        >>> read_json(path, lambda record: None if "seed" in record else "it has no seed", "it is made again")
        {'seed': 5}
    """
    try:
        content = json.loads(retried(path.read_bytes))
        fault = fault_of(content)
    except FileNotFoundError:
        return None
    except IsADirectoryError:
        fault = "it is a folder"
    except (ValueError, RecursionError) as error:
        fault = f"it is no JSON: {type(error).__name__}: {error}"
    if fault is None:
        return content
    print(f"warning: {path} is damaged ({fault}): moved to {_aside(path)}; {instead}", file=sys.stderr)
    return None


def _aside(path: Path) -> str:
    """Moves a damaged file out of the way, and takes no other's place."""
    number = 1
    while True:
        aside = path.with_name(f"{path.name}{UNUSABLE}{'' if number == 1 else f'-{number}'}")
        if not aside.exists():
            break
        number += 1
    with contextlib.suppress(FileNotFoundError):  # another process was quicker
        os.rename(path, aside)
    return aside.name
