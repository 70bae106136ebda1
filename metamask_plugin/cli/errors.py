"""How the command line ends when the user's input is at fault."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from metamask_plugin.errors import UserError


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns a :class:`UserError` into one line on stderr and exit code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
