"""One image file: opened, held against what a sound file looks like, decoded to RGB.

What Pillow would do silently, and is not done here:

- a grey image of 16 bits is scaled to 8, the whole range to the whole range; Pillow clips it, which leaves
  white. The range of 32-bit pixels (floats, and whole numbers in TIFF) is not known: refused.
- a JPEG or PNG without its end is refused, however little is missing.
- an image of more pixels than ``PIL.Image.MAX_IMAGE_PIXELS`` is refused before its memory is asked for; up to
  twice as many Pillow only warns of.
- other formats than :data:`FORMATS` are refused, whatever the file's name; Pillow would hand PostScript to an
  interpreter.

As with torchvision and solo-learn, transparency is dropped (the colours below it stay), an EXIF orientation
is ignored (the pixels stay as stored), and of several frames the first is taken.
"""

import errno
import os
import stat
import warnings
from collections.abc import Callable
from functools import cache
from typing import BinaryIO, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from metamask_plugin.data.unreadable import MachineFault, UnreadableImage, one_line, printable

Result = TypeVar("Result")

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "BMP", "DIB", "PPM", "TIFF", "GIF", "AVIF", "JPEG2000")
END_OF_JPEG = b"\xff\xd9"
END_OF_PNG = b"\x00\x00\x00\x00IEND\xaeB`\x82"
# Grey of 16 bits, in every byte order; "I" is what older versions of Pillow make of it, in these formats.
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
SIXTEEN_BIT_FORMATS = ("PNG", "PPM")
# Faults of the machine, not of the file: to leave the image out would hide them.
OF_THE_MACHINE = {errno.EMFILE, errno.ENFILE, errno.ENOMEM}

# Sizes are checked here; the warning would be a second line to the same end.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class _Unsound(Exception):
    """Why a file is refused, in our words."""


def read_rgb(path: str) -> Image.Image:
    """Decodes a file to RGB.

    Raises:
        UnreadableImage: the file is missing, damaged, too large or no image; one line.
    """
    reason = _trial(path, _decode)
    if isinstance(reason, Image.Image):
        return reason
    raise UnreadableImage(
        f"image file {printable(path)} must be readable, got {reason}; replace or delete it", reason
    )


def header_fault(path: str) -> str | None:
    """Why a file cannot be an image that is whole, from its header and its last bytes; None if it can.

    JPEG and PNG are not decoded as long as they end as they should; other formats have no such end, and are.
    """
    return _trial(path, _check)


def decode_fault(path: str) -> str | None:
    """Why a file cannot be decoded; None if it can."""
    found = _trial(path, _decode)
    return found if isinstance(found, str) else None


def _trial(path: str, attempt: Callable[[BinaryIO], Result]) -> Result | str:
    """What ``attempt`` makes of the opened file, or the reason why nothing."""
    try:
        with _opened(path) as file:
            return attempt(file)
    except _Unsound as error:
        return str(error)
    except UnidentifiedImageError:
        return "no image of a known format"
    except MemoryError:
        raise
    # Pillow's readers fail on damaged bytes by OSError, SyntaxError, struct.error, or whatever they stumble
    # on.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in OF_THE_MACHINE:
            raise MachineFault(
                f"image file {printable(path)} must be readable, got {error.strerror}, which is no fault of "
                "the file; close other programs, or lower data.num_workers"
            ) from None
        return one_line(error)


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


def _check(file: BinaryIO) -> None:
    image = _sound(file)
    if image.format not in ("JPEG", "MPO", "PNG"):
        image.load()


def _decode(file: BinaryIO) -> Image.Image:
    return _to_rgb(_sound(file))


def _sound(file: BinaryIO) -> Image.Image:
    """Reads the header, and what must stand at the end. Raises what :func:`_trial` turns into a reason."""
    _refuse_too_large(*_webp_size(file))  # Pillow's reader of this format asks for the memory at once
    try:
        image = Image.open(file, formats=_formats())
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _Unsound(f"more pixels than the {Image.MAX_IMAGE_PIXELS:,} allowed ({error})") from None
    _refuse_too_large(*image.size)
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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in SIXTEEN_BITS or image.mode == "I":
        wide = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((wide * 255 + 32767) // 65535).astype(np.uint8))
    image.load()
    # Pillow would warn that it drops a palette's transparency, and drop it.
    image.info.pop("transparency", None)
    return image.convert("RGB")


@cache
def _formats() -> list[str]:
    """Those of :data:`FORMATS` that this Pillow was built with."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
