import numpy as np
import pytest
from PIL import Image

from metamask_plugin.data.images import centre_square, clip_box, square_box


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((1.2, 2.9, 3.1, 4.0), (1, 2, 4, 4)),
        ((-3, -0.5, 99, 6.5), (0, 0, 10, 6)),
        ((4, 2, 4, 2), (4, 2, 5, 3)),
        ((10, 6, 12, 9), (9, 5, 10, 6)),
        ((-5, -5, -2, -1), (0, 0, 1, 1)),
    ],
)
def test_clip_box(box, expected):
    assert clip_box(box, 10, 6) == expected


@pytest.mark.parametrize("width, height, size", [(40, 24, 24), (24, 41, 24), (50, 33, 16), (9, 20, 18)])
def test_square_box_follows_the_pixels(width, height, size):
    rng = np.random.default_rng(0)
    for _ in range(20):
        (x0, x1), (y0, y1) = (sorted(rng.choice(side + 1, 2, replace=False)) for side in (width, height))
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        pixels[y0:y1, x0:x1] = 255
        bright = np.array(centre_square(Image.fromarray(pixels), size))[..., 0] > 127
        left, top, right, bottom = square_box((x0, y0, x1, y1), width, height, size)
        assert 0 <= left < right <= size and 0 <= top < bottom <= size
        outside = bright.copy()
        outside[top:bottom, left:right] = False
        assert not outside.any()
        if min(width, height) == size and bright.any():
            # nothing was resized: exactly the white pixels
            assert bright[top:bottom, left:right].all()


def test_square_box_outside_the_square_keeps_the_nearest_pixel():
    assert square_box((0, 3, 4, 5), 30, 10, 10) == (0, 3, 1, 5)
    assert square_box((28, 3, 30, 5), 30, 10, 10) == (9, 3, 10, 5)
    assert square_box((0, 0, 30, 10), 30, 10, 5) == (0, 0, 5, 5)
