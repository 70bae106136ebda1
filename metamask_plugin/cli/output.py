"""Lets a training survive the end of whoever reads what it prints."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
