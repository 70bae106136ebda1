"""Views drawn by NVIDIA DALI [0], which also reads and decodes the image files. Import it only where DALI is.

[0] https://docs.nvidia.com/deeplearning/dali
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from nvidia.dali import fn, math, pipeline_def, types

from metamask_plugin.data.augmentations import Augmentation
from metamask_plugin.data.batched_crop import ASPECT, TRIES
from metamask_plugin.data.views import BLUR_SIGMA

CUBIC = types.INTERP_CUBIC


@pipeline_def(enable_conditionals=True)
def dali_views(
    batches: Iterable[tuple[Sequence[np.ndarray], np.ndarray]],
    entries: Sequence[Augmentation],
    mean: Sequence[float],
    std: Sequence[float],
    device: str,
) -> tuple[Any, ...]:
    """A pipeline that gives ``(view (B, 3, s, s), ..., indexes (B,))`` until ``batches`` is exhausted.

    The views are float32, normalised, in the order of ``entries``, and distributed as those of
    :class:`~metamask_plugin.data.views.TorchvisionViews`, except for what DALI does in its own way:

    - colour jitter: hue, saturation, contrast, brightness in this order, not a random one, and clipped once
      at the end; contrast is about medium grey, not the image's mean; hue turns in YIQ, not in HSV.
    - equalisation: OpenCV's formula, not Pillow's.
    - blur: the border is mirrored, not continued; a Gaussian cut at three sigma, not Pillow's repeated boxes.
    - interpolation and, with ``gpu``, JPEG's decoding differ by some grey levels from Pillow's.

    Args:
        batches: of each batch the files' paths, uint8 each, and their indexes, int64, shape (B,).
        entries: see :func:`~metamask_plugin.data.augmentations.parse_augmentations`.
        mean: per channel, for images in [0, 1].
        std: per channel.
        device: ``cpu`` or ``gpu``: where JPEGs are decoded and views drawn.

    The decorator adds DALI's own arguments: ``batch_size``, ``num_threads``, ``device_id``, ``seed``. What
    is drawn is a function of ``seed``, the place in the batch and the number of the batch.
    """
    paths, indexes = fn.external_source(
        source=batches, num_outputs=2, dtype=[types.UINT8, types.INT64], ndim=[1, 0]
    )
    files = fn.io.file.read(paths)
    # As Pillow reads them: not turned by EXIF's orientation, chroma interpolated.
    shapes = fn.peek_image_shape(files, adjust_orientation=False)
    images = fn.decoders.image(
        files,
        device="mixed" if device == "gpu" else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        jpeg_fancy_upsampling=True,
    )
    views = []
    # Loops, not comprehensions: DALI rewrites this function for the conditions, and does not look into those.
    for entry in entries:
        for _ in range(entry.num_crops):
            views.append(_view(images, shapes, entry, mean, std))
    return (*views, indexes)


def _view(images: Any, shapes: Any, entry: Augmentation, mean: Sequence[float], std: Sequence[float]) -> Any:
    if entry.crop_scale:
        view = fn.random_resized_crop(
            images,
            size=entry.crop_size,
            random_area=entry.crop_scale,
            random_aspect_ratio=ASPECT,
            num_attempts=TRIES,
            interp_type=CUBIC,
        )
    else:
        view = _centre_square(images, shapes[:2], entry.crop_size)
    # A condition on what DALI draws splits the batch; one on a number of ours leaves the operation out.
    if entry.color_jitter and _coin(entry.color_jitter):
        view = fn.color_twist(
            view,
            brightness=_factor(entry.brightness),
            contrast=_factor(entry.contrast),
            saturation=_factor(entry.saturation),
            hue=_uniform(-360 * entry.hue, 360 * entry.hue),  # degrees
        )
    if entry.grayscale and _coin(entry.grayscale):
        grey = fn.color_space_conversion(view, image_type=types.RGB, output_type=types.GRAY)
        view = fn.cat(grey, grey, grey, axis=2)
    if entry.gaussian_blur and _coin(entry.gaussian_blur):
        view = fn.gaussian_blur(view, sigma=_uniform(*BLUR_SIGMA))
    if entry.solarization and _coin(entry.solarization):
        # inverts what is above 127
        view = math.min(view, types.Constant(255, dtype=types.UINT8) - view)
    if entry.equalization and _coin(entry.equalization):
        view = fn.equalize(view)
    return fn.crop_mirror_normalize(
        view,
        mirror=fn.random.coin_flip(probability=entry.horizontal_flip),
        mean=[255 * value for value in mean],
        std=[255 * value for value in std],
        dtype=types.FLOAT,
        output_layout="CHW",
    )


def _centre_square(images: Any, extents: Any, size: int) -> Any:
    """:func:`~metamask_plugin.data.splits.centre_square`, to the pixel where torchvision puts it."""
    resized = size * extents // fn.reductions.min(extents)
    view = fn.resize(images, size=fn.cast(resized, dtype=types.FLOAT), interp_type=CUBIC)
    margins = resized - size
    # half the margin, rounded as Python does: a half goes to the even neighbour
    starts = (margins + margins // 2 % 2) // 2
    return fn.slice(view, start=fn.cast(starts, dtype=types.INT32), shape=(size, size), axis_names="HW")


def _coin(probability: float) -> Any:
    return fn.random.coin_flip(probability=probability, dtype=types.BOOL)


def _factor(strength: float) -> Any:
    """torchvision's range of a factor: 1 ± strength, never negative."""
    return _uniform(max(0.0, 1 - strength), 1 + strength)


def _uniform(low: float, high: float) -> Any:
    # DALI refuses an empty range, which is what a strength of 0 asks for
    return fn.random.uniform(range=(low, high)) if low < high else low
