"""Repeats an action that a busy or briefly absent file system refuses."""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")

TRANSIENT = frozenset(
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ENOTCONN", "EBUSY", "ETIMEDOUT", "EAGAIN", "EREMOTEIO")
    if hasattr(errno, name)
)
"""Errors of network file systems and failing disks, which may be gone a moment later."""


def retried(action: Callable[[], Result], tries: int = 5, first_wait: float = 0.1) -> Result:
    """Returns what ``action`` returns, and repeats it after an OSError of :data:`TRANSIENT`.

    Args:
        action: what may be repeated without harm.
        tries: calls of ``action`` at most.
        first_wait: seconds before the second call; doubles with each further one.

    Raises:
        OSError: the last error, or the first of another kind.
    """
    for attempt in range(tries - 1):
        try:
            return action()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(first_wait * 2**attempt)
    return action()
