import numpy as np
import pytest
import torch
from PIL import Image

from metamask_plugin.data.datasets.confounded_digits import confounded_digits
from metamask_plugin.data.images import centre_square, clip_box, square_box
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.splits import FileImages, MemoryImages
from metamask_plugin.data.views import EvaluationView
from metamask_plugin.errors import UserError

FILL = (0.2, 0.4, 0.6)
COLOUR = [51, 102, 153]
BOXES = [[0, 0, 9, 7], [2, 1, 5, 6], [8, 6, 9, 7], [0, 3, 9, 4]]


def noise_images(count: int = 4, height: int = 7, width: int = 9) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)


def memory_split() -> MemoryImages:
    return MemoryImages(noise_images(), [0, 1, 1, 0], ["a", "b"], torch.tensor(BOXES, dtype=torch.int32))


def file_split(folder) -> FileImages:
    """The same images as :func:`memory_split`."""
    split = memory_split()
    paths = [str(folder / f"{i}.png") for i in range(len(split))]
    for i, path in enumerate(paths):
        split.image(i).save(path)
    return FileImages(paths, split.labels, split.classes, split.boxes)


def pixels_of(split, index: int) -> torch.Tensor:
    return torch.from_numpy(np.array(split.image(index))).permute(2, 0, 1)


def by_loops(image: torch.Tensor, box: list[int], region: str) -> torch.Tensor:
    expected = image.clone()
    for y in range(image.shape[1]):
        for x in range(image.shape[2]):
            inside = box[0] <= x < box[2] and box[1] <= y < box[3]
            if inside != (region == "foreground"):
                expected[:, y, x] = torch.tensor(COLOUR)
    return expected


@pytest.mark.parametrize("region", ["foreground", "background"])
@pytest.mark.parametrize("files", [False, True])
def test_fill_equals_loops_over_pixels(tmp_path, region, files):
    split = file_split(tmp_path) if files else memory_split()
    seen = region_of(split, region, FILL)
    assert len(seen) == 4 and seen.classes == split.classes and torch.equal(seen.labels, split.labels)
    assert seen.boxes is None and seen.masks is None
    for i, image in enumerate(noise_images()):
        assert torch.equal(pixels_of(seen, i), by_loops(image, BOXES[i], region))
        assert torch.equal(pixels_of(split, i), image), "the split itself was changed"


@pytest.mark.parametrize("files", [False, True])
def test_zoom_shows_the_box_alone(tmp_path, files):
    split = file_split(tmp_path) if files else memory_split()
    seen = region_of(split, "foreground", FILL, "zoom")
    for i, image in enumerate(noise_images()):
        x0, y0, x1, y1 = BOXES[i]
        side = max(x1 - x0, y1 - y0)
        canvas = torch.tensor(COLOUR, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
        left, top = (side - (x1 - x0)) // 2, (side - (y1 - y0)) // 2
        canvas[:, top : top + y1 - y0, left : left + x1 - x0] = image[:, y0:y1, x0:x1]
        square = Image.fromarray(canvas.permute(1, 2, 0).numpy())
        expected = square if files else centre_square(square, 9)
        assert seen.image(i).tobytes() == expected.tobytes()


def test_a_background_keeps_its_place_whatever_the_form():
    split = memory_split()
    zoom, fill = (region_of(split, "background", FILL, form) for form in ("zoom", "fill"))
    assert torch.equal(zoom.images, fill.images)


def test_full_is_the_split_itself(tmp_path):
    for split in (memory_split(), file_split(tmp_path)):
        assert region_of(split, "full") is split
    bare = MemoryImages(noise_images(), [0] * 4, ["a"])
    assert region_of(bare, "full") is bare


@pytest.mark.parametrize("form", ["fill", "zoom"])
def test_subset_and_memory_of_file_regions(tmp_path, form):
    seen = region_of(file_split(tmp_path), "foreground", FILL, form)
    picked = seen.subset([3, 1])
    assert picked.labels.tolist() == [0, 1] and len(picked.subset([1])) == 1
    assert picked.image(0).tobytes() == seen.image(3).tobytes()
    assert picked.subset([1]).image(0).tobytes() == seen.image(1).tobytes()
    decoded = picked.to_memory(7)
    assert decoded.images.shape == (2, 3, 7, 7) and decoded.boxes is None
    assert torch.equal(
        pixels_of(decoded, 1), torch.from_numpy(np.array(centre_square(seen.image(1), 7))).permute(2, 0, 1)
    )


def test_generated_images_keep_what_else_they_know():
    train, _ = confounded_digits(size=16)
    seen = region_of(train, "background")
    assert torch.equal(seen.backgrounds, train.backgrounds) and train.boxes is not None


@pytest.mark.parametrize("region", ["foreground", "background"])
def test_the_mean_turns_to_zero_when_normalised(region):
    split, mean, std = memory_split(), (0.48, 0.45, 0.4), (0.25, 0.25, 0.25)
    seen = EvaluationView(7, mean, std)(region_of(split, region, mean).images)
    full = EvaluationView(7, mean, std)(split.images)
    removed = (seen - full).abs().amax(1) > 0.02
    assert removed.any()
    # half a step of the 255 that uint8 has
    assert seen.movedim(1, -1)[removed].abs().max() <= 0.5 / 255 / 0.25 + 1e-5


@pytest.mark.parametrize(
    ("region", "form", "message"),
    [
        ("foregroud", "fill", r"data\.region must be one of .* did you mean 'foreground'"),
        ("foreground", "zom", r"data\.region_form must be one of fill, zoom, .* did you mean 'zoom'"),
        ("background", "fill", r"data\.region must be full, as these images have no foreground boxes, got"),
    ],
)
def test_errors_are_one_line(region, form, message):
    split = memory_split()
    split.boxes = None
    with pytest.raises(UserError, match=message) as error:
        region_of(split, region, FILL, form)
    assert "\n" not in str(error.value)


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
