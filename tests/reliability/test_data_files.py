"""Single image files: cut at every byte, with bytes flipped, larger than memory, and of every mode."""

import os
import random
import zlib
from pathlib import Path

import numpy as np
import pytest
from image_faults import (
    encoded,
    jpeg_claiming,
    photograph,
    png_chunk,
    png_claiming,
    with_thumbnail,
)
from PIL import Image

from metamask_plugin.data.images import FORMATS, UnreadableImage, fault, formats, read_rgb

# Pillow's remarks on what it reads over
pytestmark = [pytest.mark.fault("data"), pytest.mark.filterwarnings("ignore")]


def written(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


WHOLE = {
    "JPEG": lambda: encoded("JPEG", photograph(12, 8)),
    "progressive JPEG": lambda: encoded("JPEG", photograph(12, 8), progressive=True),
    "JPEG with a thumbnail": with_thumbnail,
    "PNG": lambda: encoded("PNG", photograph(12, 8)),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file_cut_anywhere_is_found_without_decoding_it(tmp_path, kind, record_property):
    whole = WHOLE[kind]()
    path = tmp_path / "image.jpg"
    assert fault(written(path, whole)) is None and fault(str(path), decode=True) is None
    missed = []
    for length in reversed(range(len(whole) - 4 * (kind == "PNG"))):  # whose end has a checksum
        os.truncate(path, length)
        found = fault(str(path))
        if found is None or "\n" in found:
            missed.append(length)
    assert not missed
    record_property("inputs", len(whole))
    record_property("tracebacks", 0)


def test_missing_pixels_are_found_by_decoding(tmp_path):
    path = written(tmp_path / "image.png", png_claiming(20, 20))
    assert fault(path) is None and "OSError" in fault(path, decode=True)


def test_what_follows_the_end_does_no_harm(tmp_path):
    for form in ("JPEG", "PNG"):
        path = written(tmp_path / "image.jpg", encoded(form) + b"\0" * 100 + b"appended by a camera")
        assert fault(path) is None and read_rgb(path).size == (64, 48)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
def test_flipped_bytes_never_leave_a_traceback(tmp_path, form, record_property):
    """Either an image comes out, or one line."""
    assert form in FORMATS
    generator = random.Random(form)
    whole, path = encoded(form, photograph(12, 8)), tmp_path / "image.jpg"
    unreadable = tries = 0
    for tries in range(1, 201):
        broken = bytearray(whole)
        for _ in range(generator.choice((1, 3, 20))):
            # most damage is done in the header
            place = generator.randrange(min(len(whole), 120) if tries % 2 else len(whole))
            broken[place] = generator.randrange(256)
        written(path, bytes(broken))
        found = fault(str(path))
        assert found is None or (found and "\n" not in found)
        try:
            assert read_rgb(str(path)).mode == "RGB"
        except UnreadableImage as error:
            assert "\n" not in str(error) and str(path) in str(error)
            unreadable += 1
    assert unreadable > 0
    record_property("inputs", tries)
    record_property("tracebacks", 0)


def memory(field: str) -> int:
    """Of this process in bytes, ``VmRSS`` now or ``VmHWM`` at its highest."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


BOMBS = {
    "PNG between Pillow's limits": (png_claiming, (10_000, 10_000)),
    "PNG above": (png_claiming, (50_000, 50_000)),
    "JPEG": (jpeg_claiming, (65_000, 65_000)),
}


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells the highest memory")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_huge_image_is_refused_before_its_memory_is_asked_for(tmp_path, kind):
    make, size = BOMBS[kind]
    path = written(tmp_path / "bomb.jpg", make(*size))
    fault(written(tmp_path / "small.jpg", make(20, 20)))  # whatever is loaded once
    Path("/proc/self/clear_refs").write_text("5")  # the highest is now
    before = memory("VmRSS")
    for decode in (False, True):
        assert "pixels" in fault(path, decode)
    assert memory("VmHWM") - before < 20e6


def ramp(dtype=np.uint16) -> np.ndarray:
    return np.linspace(0, 65535, 256).round().astype(dtype).reshape(16, 16)


def test_grey_of_16_bits_keeps_its_range(tmp_path):
    """Pillow's own conversion clips at 255, which leaves white."""
    expected = (ramp() / 257).round()
    files = {
        "a.png": encoded("PNG", Image.fromarray(ramp())),
        "b.tif": encoded("TIFF", Image.fromarray(ramp())),
        "c.pgm": b"P5 16 16 65535\n" + ramp().astype(">u2").tobytes(),
    }
    for name, content in files.items():
        path = written(tmp_path / name, content)
        assert fault(path) is None
        pixels = np.asarray(read_rgb(path))
        assert np.array_equal(pixels, np.repeat(expected[..., None], 3, axis=2)), name
    clipped = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert (clipped == 255).mean() > 0.9, "this Pillow scales by itself: what is done here can go"


def test_colour_of_16_bits_is_scaled(tmp_path):
    rows = b"".join(b"\0" + b"\x12\x34\x80\x00\xff\xff" * 4 for _ in range(4))
    header = b"\0\0\0\4\0\0\0\4\x10\2\0\0\0"  # 4 x 4, 16 bits, RGB
    chunks = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    content = b"\x89PNG\r\n\x1a\n" + chunks
    assert read_rgb(written(tmp_path / "a.png", content)).getpixel((1, 1)) == (0x12, 0x80, 0xFF)


def flat(mode: str, colour, **options) -> bytes:
    form = options.pop("form", "PNG")
    return encoded(form, Image.new(mode, (8, 8), colour), **options)


def palette(**options) -> bytes:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([9, 9, 9, 200, 30, 60])
    return encoded("PNG", image, **options)


MODES = {
    "grey": (lambda: flat("L", 77), (77, 77, 77)),
    "grey with alpha": (lambda: flat("LA", (77, 0)), (77, 77, 77)),
    "RGBA": (lambda: flat("RGBA", (200, 30, 60, 0)), (200, 30, 60)),
    "RGB with a transparent colour": (
        lambda: flat("RGB", (200, 30, 60), transparency=(200, 30, 60)),
        (200, 30, 60),
    ),
    "palette with a transparent colour": (lambda: palette(transparency=1), (200, 30, 60)),
    "palette with alpha": (lambda: palette(transparency=b"\x80\x00"), (200, 30, 60)),
    "CMYK": (lambda: flat("CMYK", (0, 255, 0, 0), form="JPEG", quality=100), (255, 0, 255)),
    "YCbCr TIFF": (lambda: flat("YCbCr", (128, 128, 128), form="TIFF"), (128, 128, 128)),
    **{form: (lambda form=form: flat("RGB", (77, 77, 77), form=form), (77,) * 3) for form in formats()},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_and_format_becomes_rgb_without_a_word(tmp_path, mode):
    make, colour = MODES[mode]
    path = written(tmp_path / "image.png", make())
    assert fault(path) is None and fault(path, decode=True) is None
    image = read_rgb(path)
    assert image.mode == "RGB" and image.size == (8, 8)
    assert np.abs(np.array(image.getpixel((3, 3))) - colour).max() <= 2


def test_an_exif_orientation_is_left_to_those_who_wrote_it(tmp_path):
    """As in solo-learn and torchvision: the pixels stay as they are stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = written(tmp_path / "turned.jpg", encoded("JPEG", photograph(40, 20), exif=exif))
    assert read_rgb(path).size == (40, 20)
    assert np.array_equal(np.asarray(read_rgb(path)), np.asarray(Image.open(path)))
