"""One piece of work for each image, on several threads, with a progress bar where it takes long."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from tqdm import tqdm

Result = TypeVar("Result")

# Below this a progress bar flickers by before it can be read.
PROGRESS_FROM = 2000
# A million queued futures would be a gigabyte.
CHUNK = 64


def each_image(count: int, work: Callable[[int], Result], title: str, threads: int = 4) -> dict[int, Result]:
    """What ``work`` returns for the indexes below ``count``, without the Nones, in order.

    Args:
        count: images.
        work: called with an index, on any thread; Pillow releases the GIL while it decodes.
        title: of the progress bar.
        threads: that run at once.

    Raises:
        Exception: the first that ``work`` raises; what is still queued is dropped.
    """

    def chunk(start: int) -> list[tuple[int, Result]]:
        return [(index, work(index)) for index in range(start, min(start + CHUNK, count))]

    hidden = count <= PROGRESS_FROM or not sys.stderr.isatty()
    found: dict[int, Result] = {}
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(desc=title, total=count, unit="image", disable=hidden) as progress,
    ):
        try:
            for results in pool.map(chunk, range(0, count, CHUNK)):
                found.update((index, result) for index, result in results if result is not None)
                progress.update(len(results))
        except BaseException:
            # Otherwise leaving the pool first works off all that is still queued.
            pool.shutdown(cancel_futures=True)
            raise
    return found
