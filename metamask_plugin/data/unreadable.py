"""What is said of image files and folders that cannot be read, always in one line."""

import errno
import os
from typing import NamedTuple

from metamask_plugin.errors import UserError
from metamask_plugin.retry import TRANSIENT

EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
"""Errors of a machine without file handles or memory."""


class SkippedImage(NamedTuple):
    """A file that is no readable image, or a folder that could not be listed.

    Attributes:
        path: as found, not escaped.
        reason: why, in one line.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class _OneLine(UserError):
    """An error that may have come from a worker.

    A ``DataLoader`` re-raises its workers' exceptions as ``type(error)(<whole traceback>)``; only the last
    line, which is the one meant for the user, is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class UnreadableImage(_OneLine):
    """An image file that cannot be decoded.

    Attributes:
        reason: what is wrong with the file; empty after the way from a worker.
    """

    def __init__(self, message: str, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class MachineFault(_OneLine):
    """An image that a failing disk, a lost network or exhausted memory hides: no reason to leave it out."""


class InvalidImages(UserError):
    """Image files that cannot be read, found before a training.

    Attributes:
        images: all of them.
    """

    def __init__(self, message: str, images: tuple[SkippedImage, ...] = ()) -> None:
        super().__init__(message)
        self.images = images


def raise_if_machines(name: str, error: BaseException) -> None:
    """Raises one line where ``error``, of the last try, is a fault of the machine and not of a file.

    Args:
        name: of what could not be read, e.g. ``"image file a.png"``.
        error: returns where it is of another kind.

    Raises:
        MachineFault: it is the machine's.
    """
    code = error.errno if isinstance(error, OSError) else None
    if code in TRANSIENT:
        remedy = "check the disk, the mount or the network, and go on with the same command"
    elif code in EXHAUSTED:
        remedy = "close other programs, or lower data.num_workers"
    else:
        return
    raise MachineFault(
        f"{name} must be readable, got {os.strerror(code)}, which is no fault of the file; {remedy}"
    ) from None


def printable(path: object) -> str:
    """A path as it may stand in one line: what cannot be printed (newlines, stray bytes) is escaped."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(path))


def one_line(error: BaseException) -> str:
    """An exception's name and message without line breaks."""
    return printable(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")
