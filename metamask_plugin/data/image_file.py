"""One image file: opened, held against what a sound file looks like, decoded to RGB.

What Pillow would do silently, and is not done here:

- a grey image of 16 bits is scaled to 8, the range of the bits that are used to the whole range; Pillow
  clips it, which leaves white. The range of 32-bit pixels (floats, and whole numbers in TIFF) is not known:
  refused.
- a JPEG or PNG without its end is refused, however little is missing.
- an image of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` is refused before its memory is asked for; up to
  twice as many Pillow only warns of. So is one whose shorter side, resized, would make as many.
- other formats than :data:`FORMATS` are refused, whatever the file's name; Pillow would hand PostScript to an
  interpreter.

As with torchvision and solo-learn, transparency is dropped (the colours below it stay), an EXIF orientation
is ignored (the pixels stay as stored), and of several frames the first is taken.
"""

import os
import stat
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO, NamedTuple, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from metamask_plugin.data.unreadable import UnreadableImage, one_line, printable, raise_if_machines
from metamask_plugin.retry import retried

Result = TypeVar("Result")

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
END_OF_JPEG = b"\xff\xd9"
END_OF_PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# Grey of 16 bits, in every byte order; "I" is what older versions of Pillow make of it, in these formats.
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
FIRST_BYTES = 16

# Sizes are checked here; the warning would be a second line to the same end.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class _Unsound(Exception):
    """Why a file is refused, in our words."""


@dataclass(frozen=True)
class Reading:
    """How image files are read.

    Attributes:
        bits: bits that 16-bit grey uses; ``2**bits - 1`` becomes white.
        side: pixels that the shorter side is resized to later; 0 where it is not known.
    """

    bits: int = 16
    side: int = 0


WHOLE = Reading()
"""All 16 bits are used."""


class Peak(NamedTuple):
    """The largest value of an image with 16 bits a channel.

    Attributes:
        value: on the scale of 16 bits.
        grey: whether the image is grey. Pillow keeps 8 bits of any other.
    """

    value: int
    grey: bool


def read_rgb(path: str, reading: Reading = WHOLE) -> Image.Image:
    """Decodes a file to RGB.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or no image; one line.
        MachineFault: the disk or the network fails, again and again, or memory is exhausted.
    """
    reason = _trial(path, lambda file: _to_rgb(_sound(file, reading.side), reading.bits))
    if isinstance(reason, Image.Image):
        return reason
    raise UnreadableImage(
        f"image file {printable(path)} must be readable, got {reason}; replace or delete it", reason
    )


def header_fault(path: str, reading: Reading = WHOLE) -> str | None:
    """Why a file cannot be an image that is whole, from its header and its last bytes; None if it can.

    JPEG and PNG are not decoded as long as they end as they should; other formats have no such end, and are.
    """
    return _trial(path, lambda file: _check(file, reading.side))


def decode_fault(path: str, reading: Reading = WHOLE) -> str | None:
    """Why a file cannot be decoded; None if it can."""
    try:
        read_rgb(path, reading)
    except UnreadableImage as error:
        return error.reason
    return None


def peak_of_16_bits(path: str) -> Peak | None:
    """Decodes an image with 16 bits a channel and returns its peak; None for any other file."""
    found = _trial(path, _peak)
    return found if isinstance(found, Peak) else None


def begins_like_image(path: str) -> bool:
    """Whether the first bytes of a regular file are those of an image format, whatever the file's name."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            return False
        with open(path, "rb") as file:
            first = file.read(FIRST_BYTES)
    except OSError:
        return False
    if first[:2] == b"BM":  # two letters begin many texts; four reserved bytes are zero
        return first[6:10] == bytes(4)
    if first[4:8] == b"ftyp":  # the container of videos, too
        return first[8:12] in (b"avif", b"avis", b"heic", b"heix", b"mif1")
    return first.startswith(_SIGNATURES) or (first[:4] == b"RIFF" and first[8:12] == b"WEBP")


_SIGNATURES = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\0",  # TIFF in either byte order
    b"MM\0*",
    b"\0\0\0\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
)


def _trial(path: str, attempt: Callable[[BinaryIO], Result]) -> Result | str:
    """What ``attempt`` makes of the opened file, or the reason why nothing."""
    try:
        return retried(lambda: _attempted(path, attempt))
    except _Unsound as error:
        return str(error)
    except UnidentifiedImageError:
        return "no image of a known format"
    except MemoryError:
        raise
    # Pillow's readers fail on damaged bytes by OSError, SyntaxError, struct.error, or whatever they stumble
    # on.
    except Exception as error:
        # to leave such an image out would hide what is wrong
        raise_if_machines(f"image file {printable(path)}", error)
        return one_line(error)


def _attempted(path: str, attempt: Callable[[BinaryIO], Result]) -> Result:
    with _opened(path) as file:
        return attempt(file)


def _opened(path: str) -> BinaryIO:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            target = printable(os.readlink(path))
            raise _Unsound(f"a symbolic link to {target}, which does not exist") from None
        raise _Unsound("no such file") from None
    except PermissionError:
        raise _Unsound("no permission to reach it") from None
    # To open a pipe would be to wait for its other end.
    if not stat.S_ISREG(state.st_mode):
        raise _Unsound("no regular file")
    if not state.st_size:
        raise _Unsound("an empty file")
    try:
        return open(path, "rb")
    except PermissionError:
        raise _Unsound("no permission to read it") from None


def _check(file: BinaryIO, side: int) -> None:
    image = _sound(file, side)
    if image.format not in ("JPEG", "MPO", "PNG"):
        image.load()


def _peak(file: BinaryIO) -> Peak | None:
    image = _sound(file)
    if _is_wide_grey(image):
        return Peak(int(np.asarray(image).max()), True)
    if image.tile and ";16" in str(image.tile[0][3]):  # Pillow's name of the pixels as they are stored
        return Peak(257 * int(np.asarray(image).max()), False)
    return None


def _sound(file: BinaryIO, side: int = 0) -> Image.Image:
    """Reads the header, and what must stand at the end. Raises what :func:`_trial` turns into a reason."""
    _refuse_too_large(*_webp_size(file))  # Pillow's reader of this format asks for the memory at once
    try:
        image = Image.open(file, formats=formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unsound(f"more pixels than the {Image.MAX_IMAGE_PIXELS:,} allowed ({error})") from None
    _refuse_too_large(*image.size)
    _refuse_elongated(*image.size, side)
    if image.mode == "F" or (image.mode == "I" and image.format not in SIXTEEN_BIT_FORMATS):
        raise _Unsound("32-bit pixels, whose range is not known: save it with 8 or 16 bits")
    # Pillow has read up to the pixels; an end before them would be a thumbnail's.
    if image.format in ("JPEG", "MPO"):
        _refuse_without(END_OF_JPEG, file, file.tell())
    elif image.format == "PNG":
        _refuse_without(END_OF_PNG, file, 0)
    return image


def _refuse_too_large(width: int, height: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and width * height > limit:
        raise _Unsound(f"{width} x {height} pixels, more than the {limit:,} allowed")


def _refuse_elongated(width: int, height: int, side: int) -> None:
    """Refuses an image of few pixels that becomes one of very many when its shorter side is enlarged."""
    limit, (short, long) = Image.MAX_IMAGE_PIXELS, sorted((width, height))
    if limit is not None and side * side * long > limit * short:
        raise _Unsound(
            f"{width} x {height} pixels, whose shorter side resized to {side} makes "
            f"{side * side * long // short:,} pixels, more than the {limit:,} allowed"
        )


def _refuse_without(end: bytes, file: BinaryIO, start: int) -> None:
    """Refuses a file that has no ``end`` behind ``start``. Leaves the position where it was."""
    position = file.tell()
    file.seek(-min(len(end), file.seek(0, os.SEEK_END)), os.SEEK_END)
    if file.read() != end:  # cameras and web servers append things
        file.seek(start)
        if end not in file.read():
            raise _Unsound("a truncated file, it has no end marker")
    file.seek(position)


def _webp_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height that a WebP file claims; (0, 0) of any other."""
    head = file.read(30)
    file.seek(0)
    if head[:4] != b"RIFF" or head[8:12] != b"WEBP" or len(head) < 30:
        return 0, 0
    kind, body = head[12:16], head[20:]
    if kind == b"VP8X":
        return 1 + int.from_bytes(body[4:7], "little"), 1 + int.from_bytes(body[7:10], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF


def _is_wide_grey(image: Image.Image) -> bool:
    return image.mode in SIXTEEN_BITS or image.mode == "I"


def _to_rgb(image: Image.Image, bits: int) -> Image.Image:
    if _is_wide_grey(image):
        white = 2**bits - 1
        wide = np.minimum(np.asarray(image).astype(np.uint32), white)
        image = Image.fromarray(((wide * 255 + white // 2) // white).astype(np.uint8))
    image.load()
    # Pillow would warn that it drops a palette's transparency, and drop it.
    image.info.pop("transparency", None)
    return image.convert("RGB")


@cache
def formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
