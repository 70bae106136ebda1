"""How the command line ends when the user's input, or his disk, is at fault."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from metamask_plugin.errors import UserError, printable
from metamask_plugin.retry import TRANSIENT
from metamask_plugin.signals import ended_by_signals

RESUMES = "the same command goes on with what is saved"
REMEDIES = {
    errno.ENOSPC: f"the disk is full: free space, and {RESUMES}",
    errno.EDQUOT: f"the quota is used up: free space, and {RESUMES}",
    errno.EFBIG: f"a file may not be that large here (ulimit -f): raise the limit, and {RESUMES}",
    errno.EROFS: "the file system cannot be written: set another checkpoint.dir, or mount it for writing",
    errno.EACCES: "permission is missing: change the permissions, or name another folder",
    errno.EPERM: "permission is missing: change the permissions, or name another folder",
    **dict.fromkeys(TRANSIENT, f"the file system does not answer: look after it, and {RESUMES}"),
}
"""Faults of the machine that the user can mend, and how."""


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns what the user can mend into one line on stderr and exit code 2.

    That is a :class:`UserError`, and an OSError of a full disk, of a missing permission or the like. Anything
    else is a bug, and shows its traceback. A signal ends the command with one line and 128 + its number.
    A closed standard output ends nothing.
    """
    with surviving_output(), ended_by_signals():
        try:
            yield
        except UserError as error:
            fail(str(error))
        except OSError as error:
            if error.errno not in REMEDIES:
                raise
            fail(_about_file(error))


def fail(message: str) -> None:
    """Prints the message as one line and ends with exit code 2."""
    print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    raise SystemExit(2) from None


def _about_file(error: OSError) -> str:
    file = "a file" if error.filename is None else repr(os.fspath(error.filename))
    return f"{file} cannot be read or written ({os.strerror(error.errno)}); {REMEDIES[error.errno]}"


CLOSED = (errno.EPIPE, errno.EIO)
"""What writing to a pipe without a reader, or to a terminal that is gone, answers."""


@contextmanager
def surviving_output() -> Iterator[None]:
    """Within it, standard output and error may be closed by their reader: ``| head``, a terminal that ends.

    What is printed from then on is lost; the run goes on.
    """
    plain = sys.stdout, sys.stderr
    with open(os.devnull, "w") as nowhere:  # for one that was closed before
        sys.stdout, sys.stderr = (_Surviving(stream or nowhere) for stream in plain)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stdout, sys.stderr = plain


class _Surviving:
    """A stream that drops what nobody reads any more."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._drop(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._drop(error)

    def _drop(self, error: OSError) -> None:
        if error.errno not in CLOSED:
            raise error
        # what is still in the stream's buffer would fail once more when the interpreter ends
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
