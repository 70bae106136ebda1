"""Remembers what a verification found, so that the next start on the same files need not open them again.

A record is a small file in ``$XDG_CACHE_HOME/metamask_plugin/verified`` (``~/.cache`` by default). Its name
is a hash of all paths, sizes and times of change, so a file that is replaced, cut or given other permissions
makes another name. Where no record can be written, the files are verified again.
"""

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from PIL import __version__ as pillow_version

from metamask_plugin.data.each_image import each_image
from metamask_plugin.data.image_file import FORMATS

RECORDED_FROM = 1000
"""Images. Fewer are verified in less time than it takes to notice."""
VERSION = 1
"""To be raised where a verification finds more than before."""
THREADS = 8


def remembered(paths: Sequence[str], how: str, verify: Callable[[], dict[int, str]]) -> dict[int, str]:
    """What ``verify`` returns, from a record where the same files were verified before.

    Args:
        paths: image files.
        how: the way in which they are verified.
        verify: finds, by index, why files cannot be read.
    """
    if len(paths) < RECORDED_FROM:
        return verify()
    record = _folder() / f"{_digest(paths, how)}.json"
    found = _recorded(record)
    if found is None:
        with _one_at_a_time(record):
            found = _recorded(record)
            if found is None:
                found = verify()
                _write(record, found)
    return found


@contextlib.contextmanager
def _one_at_a_time(record: Path) -> Iterator[None]:
    """Lets the other processes of a machine wait for the record of the first, instead of verifying likewise.

    Where there is no place for a lock, none waits.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            record.parent.mkdir(parents=True, exist_ok=True)
            lock = record.with_suffix(".lock")
            fcntl.flock(stack.enter_context(open(lock, "w")), fcntl.LOCK_EX)
            stack.callback(lock.unlink, missing_ok=True)
        yield


def _recorded(record: Path) -> dict[int, str] | None:
    try:
        return {int(index): str(reason) for index, reason in json.loads(record.read_text()).items()}
    except (OSError, ValueError, AttributeError):  # none, or not one of ours
        return None


def _write(record: Path, found: dict[int, str]) -> None:
    part = record.with_name(f".{record.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a home folder that is full, or that cannot be written
        part.write_text(json.dumps(found))
        os.replace(part, record)


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "metamask_plugin" / "verified"


def _digest(paths: Sequence[str], how: str) -> str:
    def state(index: int) -> tuple[int, ...]:
        try:
            found = os.stat(paths[index])
        except (OSError, ValueError):
            return ()
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    states = each_image(len(paths), state, "comparing", THREADS)
    digest = hashlib.sha256(repr((VERSION, how, pillow_version, FORMATS)).encode())
    for index, path in enumerate(paths):
        digest.update(f"{os.path.abspath(path)}\0{states[index]}\0".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]
