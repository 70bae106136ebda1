"""Whether data that are generated fit into this machine's memory."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from metamask_plugin.errors import check


def memory() -> int | None:
    """Bytes that this machine, or the container around this process, has; None where it does not say."""
    found = []
    with suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def check_generated(options: Mapping[str, Any]) -> None:
    """Refuses generated digits that memory cannot hold: as uint8, and once more as they are drawn.

    Args:
        options: ``data.kwargs``; what is no whole number is left to the data set's own check.
    """
    size, copies, test_copies = (
        options.get(key, default) for key, default in (("size", 32), ("copies", 1), ("test_copies", 1))
    )
    there = memory()
    if there is None or not all(isinstance(number, int) for number in (size, copies, test_copies)):
        return
    images = 2 * 3 * size**2 * (1297 * copies + 500 * test_copies)
    check(
        images <= there,
        "data.kwargs.size, data.kwargs.copies and data.kwargs.test_copies",
        f"those of images that fit into this machine's {there / 1e9:.0f} GB of memory",
        f"{images / 1e9:.0f} GB",
    )
