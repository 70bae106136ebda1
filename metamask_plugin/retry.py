"""Repeats file operations that fail for a moment, as on network file systems."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

TRANSIENT = frozenset((errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EBUSY, errno.ETIMEDOUT, errno.EAGAIN))
"""Errors of a file system that often pass by themselves."""


def retried(action: Callable[[], Result], tries: int = 5, first_wait: float = 0.1) -> Result:
    """Returns what ``action`` returns; repeats it while it raises an OSError of :data:`TRANSIENT`.

    Args:
        action: safe to repeat.
        tries: how often it is called at most.
        first_wait: seconds before the second try; each later wait is twice as long.
    """
    for attempt in range(tries - 1):
        try:
            return action()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
            time.sleep(first_wait * 2**attempt)
    return action()
