"""One image: its file decoded to RGB, or refused in one line; its centre square; its boxes.

Where Pillow would go on without a word:

- 16-bit grey is scaled to 8 bits; Pillow clips it, which leaves white. 32-bit pixels, whose range is not
  known, are refused.
- images of more than ``PIL.Image.MAX_IMAGE_PIXELS`` are refused; up to twice as many Pillow only warns of.
- images with a side more than :data:`MOST_ELONGATED` times the other are refused.
- formats other than :data:`FORMATS` are refused, whatever the file's name; Pillow would hand PostScript to an
  interpreter.

As with torchvision and solo-learn, transparency is dropped (the colours below it stay), an EXIF orientation
is ignored, and of several frames the first is taken.
"""

import errno
import math
import os
import stat
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from tqdm import tqdm

from metamask_plugin.errors import UserError, printable
from metamask_plugin.retry import TRANSIENT, retried

Result = TypeVar("Result")
Box = tuple[int, int, int, int]
"""x0, y0, x1, y1 in whole pixels, half open, of at least one pixel inside the image."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
# Grey of 16 bits, in every byte order; "I" is what older versions of Pillow make of it, in these formats.
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
END_OF_JPEG = b"\xff\xd9"
# A view resizes the shorter side: a thin line of few bytes would fill the memory.
MOST_ELONGATED = 1000
# A machine that does not answer, or is out of file handles or memory: no fault of the file.
MACHINE = TRANSIENT | {errno.EMFILE, errno.ENFILE, errno.ENOMEM}
# Reading waits for the disk, or for a file server, more than it computes.
THREADS = 8
# A million queued futures would be a gigabyte.
CHUNK = 64
# Below this a progress bar flickers by before it can be read.
PROGRESS_FROM = 2000

# Sizes are checked here; the warning would be a second line to the same end.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


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
    """An image that a failing disk or network or exhausted memory hides: no reason to leave it out."""


class SkippedImage(NamedTuple):
    """An image file that cannot be read.

    Attributes:
        path: of the file.
        reason: why, in one line.
    """

    path: str
    reason: str

    def __str__(self) -> str:
        return f"{printable(self.path)}: {self.reason}"


class _Refused(Exception):
    """Why a file is refused, in our words."""


def read_rgb(path: str, bits: int = 16) -> Image.Image:
    """Decodes a file to RGB.

    Args:
        path: of the file.
        bits: that 16-bit grey uses; ``2**bits - 1`` becomes white.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or no image; one line.
        MachineFault: the disk or the network fails, again and again.
    """
    with _in_one_line(path):
        return retried(lambda: _decoded(path, bits))


def fault(path: str, decode: bool = False, bits: int = 16) -> str | None:
    """Why a file cannot be read; None if it can.

    Args:
        path: of the file.
        decode: whether to decode a JPEG or PNG. Otherwise the end of a JPEG and the checksums of a PNG are
            looked at; other formats have nothing of the kind and are always decoded.
        bits: see :func:`read_rgb`.

    Raises:
        MachineFault: the disk or the network fails, again and again.
    """
    try:
        with _in_one_line(path):
            retried(lambda: _verify(path))
            if decode:
                read_rgb(path, bits)
    except UnreadableImage as error:
        return error.reason
    return None


def peak_of_16_bits(path: str) -> int | None:
    """The largest value of a 16-bit grey image; None for any other file."""
    try:
        with _opened(path) as image:
            return int(np.asarray(image).max()) if _is_wide_grey(image) else None
    except Exception:  # whatever is wrong with it is said elsewhere
        return None


@contextmanager
def _in_one_line(path: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, UserError):
        raise
    # Pillow fails on damaged bytes by OSError, SyntaxError, struct.error, or whatever it stumbles on.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in MACHINE:
            raise MachineFault(
                f"image file {printable(path)} must be readable, got {os.strerror(error.errno)}, which is no "
                "fault of the file; check the disk, the network and data.num_workers, and start again"
            ) from None
        reason = _reason(error)
        raise UnreadableImage(
            f"image file {printable(path)} must be readable, got {reason}; replace or delete it", reason
        ) from None


def _reason(error: Exception) -> str:
    if isinstance(error, _Refused):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "no image of a known format"
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return printable(" ".join(f"{type(error).__name__}: {error}".split())).rstrip(": ")


@contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """The image, its header read."""
    state = os.stat(path)
    if not stat.S_ISREG(state.st_mode):  # to open a pipe would be to wait for its other end
        raise _Refused("no regular file")
    if not state.st_size:
        raise _Refused("an empty file")
    with open(path, "rb") as file, Image.open(file, formats=formats()) as image:
        limit = Image.MAX_IMAGE_PIXELS
        if limit is not None and image.width * image.height > limit:
            raise _Refused(f"{image.width} x {image.height} pixels, more than the {limit:,} allowed")
        if max(image.size) > MOST_ELONGATED * min(image.size):
            raise _Refused(
                f"{image.width} x {image.height} pixels, a side more than {MOST_ELONGATED:,} times the other"
            )
        if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BIT_FORMATS):
            raise _Refused("32-bit pixels, whose range is not known: save it with 8 or 16 bits")
        yield image


def _verify(path: str) -> None:
    with _opened(path) as image:
        if image.format in ("JPEG", "MPO"):
            _refuse_without_end(image)
        elif image.format == "PNG":
            image.verify()
        else:
            image.load()


def _refuse_without_end(image: Image.Image) -> None:
    file = image.fp
    start = file.tell()  # Pillow has read up to the pixels; an end before them is a thumbnail's
    file.seek(-len(END_OF_JPEG), os.SEEK_END)
    if file.read() != END_OF_JPEG:  # cameras and web servers append things
        file.seek(start)
        if END_OF_JPEG not in file.read():
            raise _Refused("a truncated file, it has no end marker")


def _decoded(path: str, bits: int) -> Image.Image:
    with _opened(path) as image:
        if _is_wide_grey(image):
            white = 2**bits - 1
            wide = np.minimum(np.asarray(image).astype(np.uint32), white)
            image = Image.fromarray(((wide * 255 + white // 2) // white).astype(np.uint8))
        image.load()
        image.info.pop("transparency", None)  # Pillow would warn that it drops it, and drop it
        return image.convert("RGB")


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode in SIXTEEN_BITS or image.mode == "I"


@cache
def formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def parallel_map(work: Callable[[int], Result], count: int, title: str) -> dict[int, Result]:
    """What ``work`` returns for the indexes below ``count``, without the Nones, in order.

    Args:
        work: called with an index, on any thread; Pillow releases the GIL while it decodes.
        count: images.
        title: of the progress bar that many images have.

    Raises:
        Exception: the first that ``work`` raises; what is still queued is dropped.
    """

    def chunk(start: int) -> list[tuple[int, Result]]:
        return [(index, work(index)) for index in range(start, min(start + CHUNK, count))]

    hidden = count <= PROGRESS_FROM or not sys.stderr.isatty()
    found: dict[int, Result] = {}
    with ThreadPoolExecutor(THREADS) as pool, tqdm(desc=title, total=count, disable=hidden) as progress:
        try:
            for results in pool.map(chunk, range(0, count, CHUNK)):
                found.update((index, result) for index, result in results if result is not None)
                progress.update(len(results))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else leaving the pool works off all that is queued
            raise
    return found


def centre_square(image: Image.Image, size: int, resize: int | None = None) -> Image.Image:
    """The image's centre, ``size`` pixels square, after its shorter side was resized (bicubic).

    Args:
        image: of any size.
        size: height and width of the result.
        resize: pixels of the resized shorter side; ``size`` by default, which keeps all of it.
    """
    resize = resize or size
    if min(image.size) != resize:
        image = vision.resize(image, resize, InterpolationMode.BICUBIC)
    return vision.center_crop(image, [size, size])


def clip_box(box: Sequence[float], width: int, height: int) -> Box:
    """All pixels of the image that ``box`` touches; the nearest one where it lies outside or is empty."""
    x0, x1 = _clip_side(box[0], box[2], width)
    y0, y1 = _clip_side(box[1], box[3], height)
    return x0, y0, x1, y1


def square_box(box: Sequence[float], width: int, height: int, size: int) -> Box:
    """Where a box of an image lies in its :func:`centre_square`.

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
