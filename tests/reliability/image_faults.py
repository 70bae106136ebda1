"""Image files that are wrong in every way we know of, each made in earnest; no bytes are mocked."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


def photograph(width: int = 64, height: int = 48) -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height))


def encoded(form: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = io.BytesIO()
    (image or photograph()).save(buffer, form, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_claiming(width: int, height: int) -> bytes:
    """Some 70 bytes, whole by its chunks, which claim so many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(b"\0")) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def jpeg_claiming(width: int, height: int) -> bytes:
    whole = encoded("JPEG")
    frame = whole.index(b"\xff\xc0")
    return whole[: frame + 5] + struct.pack(">HH", height, width) + whole[frame + 9 :]


def with_thumbnail() -> bytes:
    """A JPEG that holds another one in its EXIF block, with an end marker of its own."""
    thumbnail = encoded("JPEG", photograph(8, 8).convert("L"))
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + thumbnail
    whole = encoded("JPEG", photograph(12, 8).convert("L"), exif=exif)
    assert whole.count(b"\xff\xd9") == 2
    return whole


def wide(dtype: type) -> bytes:
    """A TIFF of 32-bit numbers."""
    return encoded("TIFF", Image.fromarray(np.arange(64 * 48, dtype=dtype).reshape(48, 64)))


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


CONTENTS = {
    "JPEG cut in half": lambda: half(encoded("JPEG")),
    "progressive JPEG cut": lambda: encoded("JPEG", progressive=True)[:-700],
    "PNG cut in half": lambda: half(encoded("PNG")),
    "TIFF cut": lambda: encoded("TIFF")[:-100],
    "WebP cut": lambda: encoded("WEBP")[:-100],
    "zero bytes": lambda: b"",
    "web page": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>\n",
    "random bytes": lambda: np.random.default_rng(0).bytes(5000),
    "PostScript": lambda: encoded("EPS"),
    "32-bit TIFF": lambda: wide(np.int32),
    "PNG bomb, Pillow warns": lambda: png_claiming(10_000, 10_000),
    "JPEG bomb": lambda: jpeg_claiming(65_000, 65_000),
    "PNG of one line": lambda: png_claiming(20_000_000, 1),
}
"""What a file with an image's name may hold instead of one."""


PLACES = {
    "dangling link": lambda path: path.symlink_to("gone.jpg"),
    "named pipe": lambda path: os.mkfifo(path),
    "vanished": lambda path: None,
}
"""What may lie where a file was."""

FAULTS = (*CONTENTS, *PLACES)


def inject(fault: str, path: Path) -> None:
    """Puts ``fault`` in the place of the image at ``path``."""
    if fault in CONTENTS:
        path.write_bytes(CONTENTS[fault]())
    else:
        path.unlink(missing_ok=True)
        PLACES[fault](path)


def make_tree(root: Path, classes: tuple[str, ...] = ("cat", "dog"), images: int = 4) -> Path:
    """``<root>/<class>/<i>.jpg``, all sound and none like another."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.new("RGB", (20, 16), (60 * label, 40 * i, 90)).save(root / name / f"{i}.jpg")
    return root
