"""Digits on photographs, with a knob for how far the background gives the class away.

The digit is the semantic foreground, the background the confounder: ICL-MSR's question (how much of what was
learnt is background?) and MetaMask's (which feature dimensions carry it?), small enough for a laptop.
"""

from collections.abc import Sequence

import torch
from sklearn.datasets import load_sample_images
from torch import Generator, Tensor
from torch.nn import functional as F

from metamask_plugin.data.datasets.digits import CLASSES, raw_digits
from metamask_plugin.data.splits import MemoryImages
from metamask_plugin.errors import check

# Disjoint regions of scikit-learn's two photographs (640 x 427 pixels), chosen by eye to look different:
# (name, photograph, x0, y0, x1, y1). Digit c belongs to region c.
REGIONS = (
    ("sky", 0, 340, 5, 640, 120),
    ("facade", 0, 100, 140, 320, 325),
    ("lake", 0, 340, 165, 545, 285),
    ("bush", 0, 5, 335, 205, 427),
    ("grove", 0, 385, 312, 555, 427),
    ("leaf", 1, 5, 90, 120, 300),
    ("petals", 1, 195, 115, 280, 325),
    ("heart", 1, 285, 150, 375, 285),
    ("night", 1, 50, 300, 190, 427),
    ("rim", 1, 385, 110, 475, 330),
)
# A patch covers this many pixels of the photograph, whatever the canvas: enough to show the texture, and
# small enough that even the smallest region holds some thousand different patches.
PATCH = 40
# Images rendered at once: bounds the memory that many copies take.
CHUNK = 512
# Colours that are tried for each digit; the first that stands out is taken.
COLOURS = 12
# Least mean difference of luma (in [0, 1]) between the digit's colour and the patch under it, chosen by eye
# on a contact sheet. Luma, because it is what legibility hangs on.
CONTRAST = 0.35

Rendered = tuple[Tensor, Tensor, Tensor]


class ConfoundedImages(MemoryImages):
    """Images that know which region of the photographs their background was cut from, and whose digit it is.

    Attributes:
        backgrounds: index into :data:`REGIONS`, int64, shape (N,).
        originals: the handwritten digit that each image shows, as its index among those of the split, int64,
            shape (N,).
    """

    def __init__(self, *args, backgrounds: Tensor, originals: Tensor, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.backgrounds = backgrounds
        self.originals = originals


def confounded_digits(
    correlation: float = 0.5, size: int = 32, seed: int = 0, copies: int = 1, test_copies: int = 1
) -> tuple[ConfoundedImages, ConfoundedImages]:
    """Training and test split of coloured digits on patches of photographs, with boxes and masks.

    A training image's background comes from the region of its class with probability ``correlation``, else
    from a region drawn uniformly (which may be the same one): the share on their own region is
    ``correlation + (1 - correlation) / 10``. Test backgrounds are always drawn uniformly, and the test split
    does not depend on ``correlation`` or ``copies``.

    Args:
        correlation: 0 (background and class independent) to 1 (each class on its own region), training only.
        size: height and width in pixels, at least 16.
        seed: colours, places and backgrounds are a function of it; torch's global generator is not touched.
        copies: renderings of each training digit, with other colour, place and background.
        test_copies: renderings of each test digit, likewise. One copy follows the other, and the first are
            the images that one copy alone has.

    Raises:
        UserError: an option is out of range.
    """
    _check_options(correlation, size, seed, copies, test_copies)
    (train_ink, train_labels), (test_ink, test_labels) = raw_digits()
    train_ink, train_labels = train_ink.repeat(copies, 1, 1), train_labels.repeat(copies)
    # Distinct streams: else the test digits would wear the training digits' colours.
    train_rng, test_rng = (torch.Generator().manual_seed(2 * seed + split) for split in (0, 1))
    train = _render(train_ink, train_labels, correlation, size, train_rng)
    # Copy by copy from one stream: so further copies leave the first as it is.
    test = [_render(test_ink, test_labels, 0.0, size, test_rng) for _ in range(test_copies)]
    return _as_split(train_labels, [train], copies), _as_split(
        test_labels.repeat(test_copies), test, test_copies
    )


def _check_options(correlation: float, size: int, seed: int, copies: int, test_copies: int) -> None:
    number = isinstance(correlation, int | float)
    check(number and 0 <= correlation <= 1, "data.kwargs.correlation", "between 0 and 1", correlation)
    least = {"size": (size, 16), "seed": (seed, 0), "copies": (copies, 1), "test_copies": (test_copies, 1)}
    for name, (given, lowest) in least.items():
        expected = f"a whole number of at least {lowest}" + (" (pixels)" if name == "size" else "")
        check(isinstance(given, int) and given >= lowest, f"data.kwargs.{name}", expected, given)


def _as_split(labels: Tensor, parts: Sequence[Rendered], copies: int) -> ConfoundedImages:
    images, masks, backgrounds = (torch.cat(tensors) for tensors in zip(*parts))
    return ConfoundedImages(
        images,
        labels,
        CLASSES,
        boxes_of(masks),
        masks,
        backgrounds=backgrounds,
        originals=torch.arange(len(labels) // copies).repeat(copies),
    )


def _render(ink: Tensor, labels: Tensor, correlation: float, size: int, rng: Generator) -> Rendered:
    """Images, masks and backgrounds."""
    backgrounds = _draw_backgrounds(labels, correlation, rng)
    photographs = torch.stack([torch.from_numpy(photo.copy()) for photo in load_sample_images().images])
    images, masks = [], []
    for ink_chunk, regions in zip(ink.split(CHUNK), backgrounds.split(CHUNK), strict=True):
        patches = _cut_patches(photographs, regions, size, rng)
        alpha = _draw_alpha(ink_chunk, size, rng)
        colour = _draw_colours(patches, alpha, rng)
        blended = patches + alpha[:, None] * (colour[:, :, None, None] - patches)
        images.append((blended * 255).round().to(torch.uint8))
        masks.append(alpha > 0.5)
    return torch.cat(images), torch.cat(masks), backgrounds


def _draw_backgrounds(labels: Tensor, correlation: float, rng: Generator) -> Tensor:
    """Both draws are made for every image, so the same seed gives nested confounding over ``correlation``."""
    confounded = torch.rand(len(labels), generator=rng) < correlation
    uniform = torch.randint(len(REGIONS), (len(labels),), generator=rng)
    return torch.where(confounded, labels, uniform)


def _cut_patches(photographs: Tensor, regions: Tensor, size: int, rng: Generator) -> Tensor:
    """Random patches of the given regions, float32 in [0, 1], shape (N, 3, size, size)."""
    table = torch.tensor([region[1:] for region in REGIONS])[regions]
    photo, x0, y0, x1, y1 = table.unbind(1)
    along_x, along_y = torch.rand(2, len(regions), generator=rng)
    left = x0 + (along_x * (x1 - x0 - PATCH + 1)).long()
    top = y0 + (along_y * (y1 - y0 - PATCH + 1)).long()
    offsets = torch.arange(PATCH)
    rows, columns = top[:, None] + offsets, left[:, None] + offsets
    patches = photographs[photo[:, None, None], rows[:, :, None], columns[:, None, :]]
    patches = patches.permute(0, 3, 1, 2).float() / 255
    return F.interpolate(patches, (size, size), mode="bilinear", antialias=True).clamp(0, 1)


def _draw_alpha(ink: Tensor, size: int, rng: Generator) -> Tensor:
    """The digits at 70-85 % of the canvas, shifted within it, as opacity of shape (N, size, size)."""
    count = len(ink)
    scale = 0.70 + 0.15 * torch.rand(count, generator=rng)
    shift = (torch.rand(2, count, generator=rng) * 2 - 1) * (1 - scale)
    # grid = affine . canvas: canvas point p shows the digit's point (p - shift) / scale.
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0] = affine[:, 1, 1] = 1 / scale
    affine[:, 0, 2], affine[:, 1, 2] = -shift[0] / scale, -shift[1] / scale
    grid = F.affine_grid(affine, [count, 1, size, size], align_corners=False)
    smooth = F.grid_sample(ink[:, None], grid, mode="bicubic", align_corners=False)[:, 0]
    # Full ink from two thirds on: the 8x8 scans' thin strokes never reach 1 and would look like stained
    # glass.
    return ((smooth - 0.25) / 0.4).clamp(0, 1)


def _draw_colours(patches: Tensor, alpha: Tensor, rng: Generator) -> Tensor:
    """For each image a random saturated colour that stands out from the patch under it, shape (N, 3)."""
    hue, saturation, value = torch.rand(3, len(patches), COLOURS, generator=rng)
    candidates = _rgb(hue, 0.75 + 0.25 * saturation, 0.35 + 0.65 * value)
    luma = torch.tensor([0.299, 0.587, 0.114])
    behind = torch.einsum("nchw,c->nhw", patches, luma).flatten(1)
    weight = (alpha / alpha.sum((1, 2), keepdim=True)).flatten(1)
    # The mean of the distances, not the distance of the mean: between a light and a dark half, grey is no
    # contrast.
    distance = torch.einsum("nkp,np->nk", ((candidates @ luma)[:, :, None] - behind[:, None]).abs(), weight)
    stands_out = distance > CONTRAST
    first = torch.where(stands_out.any(1), stands_out.int().argmax(1), distance.argmax(1))
    return candidates[torch.arange(len(patches)), first]


def _rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """HSV in [0, 1] to RGB, colours along a new last dimension."""
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[..., None] * 6) % 6
    ramp = torch.minimum(k, 4 - k).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * ramp)


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes around the foreground: x0, y0, x1, y1 in pixels, half open, int32, shape (N, 4).

    Args:
        masks: bool, shape (N, H, W), each with at least one foreground pixel.
    """
    sides: Sequence[Tensor] = (masks.any(1), masks.any(2))
    first = [side.int().argmax(1) for side in sides]
    last = [side.shape[1] - side.flip(1).int().argmax(1) for side in sides]
    return torch.stack(first + last, 1).int()
