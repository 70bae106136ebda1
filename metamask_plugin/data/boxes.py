"""Foreground boxes: x0, y0, x1, y1 in whole pixels, half open, of at least one pixel inside the image."""

import math
from collections.abc import Sequence

Box = tuple[int, int, int, int]


def clip_box(box: Sequence[float], width: int, height: int) -> Box:
    """All pixels of the image that ``box`` touches; the nearest one where it lies outside or is empty."""
    x0, x1 = _clip_side(box[0], box[2], width)
    y0, y1 = _clip_side(box[1], box[3], height)
    return x0, y0, x1, y1


def square_box(box: Sequence[float], width: int, height: int, size: int) -> Box:
    """Where a box of an image lies in its :func:`~metamask_plugin.data.splits.centre_square`.

    Args:
        box: in pixels of the image.
        width: of the image, pixels.
        height: of the image, pixels.
        size: side of the square, pixels.
    """
    shorter = min(width, height)
    # torchvision's rounding, of the longer side as of the crop's place
    columns, rows = int(size * width / shorter), int(size * height / shorter)
    left, top = round((columns - size) / 2), round((rows - size) / 2)
    x0, x1 = (x * columns / width - left for x in box[0::2])
    y0, y1 = (y * rows / height - top for y in box[1::2])
    return clip_box((x0, y0, x1, y1), size, size)


def _clip_side(start: float, end: float, length: int) -> tuple[int, int]:
    first = min(max(math.floor(start), 0), length - 1)
    return first, max(min(math.ceil(end), length), first + 1)
