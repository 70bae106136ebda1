"""``data.format: dali``: NVIDIA DALI [0] reads and decodes the image files and draws the views.

Import this module only where DALI is.

[0] https://docs.nvidia.com/deeplearning/dali
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from nvidia.dali import fn, math, pipeline_def, types
from nvidia.dali.plugin.pytorch import DALIGenericIterator
from torch import Tensor

from metamask_plugin.data.loaders import EpochPosition, EpochShuffle
from metamask_plugin.data.splits import FileImages, ImageSplit
from metamask_plugin.data.views import ASPECT, BLUR_SIGMA, TRIES, Augmentation
from metamask_plugin.errors import UserError, check, choose

DEVICES = ("cpu", "gpu")
CUBIC = types.INTERP_CUBIC


class DaliBatches:
    """Iterates over ``[indexes (B,), [view (B, 3, s, s), ...], targets (B,)]``; whole batches only.

    Order and augmentations are functions of seed and epoch alone, so that a resumed run sees what the
    uninterrupted one would have seen: an epoch has a pipeline of its own, seeded like the workers of a
    ``DataLoader``. A second pass through the same epoch gives the same images in the same order, augmented
    anew.

    Args:
        split: image files.
        entries: how views are made, see :func:`~metamask_plugin.data.views.parse_augmentations`.
        mean: per channel, for images in [0, 1].
        std: per channel.
        batch_size: B, of one process.
        seed: the run's.
        device: ``cpu`` or ``gpu``; the views of ``gpu`` lie on the current CUDA device.
        threads: DALI's, at least 1.
        rank: this process among ``processes``; each takes its share of the one order.
        processes: how many train together.
        position: where in its epoch the run is; the beginning by default.

    Attributes:
        sampler: the epoch's order. Lightning calls its ``set_epoch``, as with a ``DataLoader``.

    Raises:
        UserError: ``split`` is none of whole image files, or an unknown or missing device; while iterating, a
            file that cannot be decoded.
    """

    def __init__(
        self,
        split: ImageSplit,
        entries: Sequence[Augmentation],
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        device: str = "cpu",
        threads: int = 1,
        rank: int = 0,
        processes: int = 1,
        position: EpochPosition | None = None,
    ) -> None:
        require_dali(split, device)
        self.split, self.entries, self.mean, self.std = split, entries, mean, std
        self.batch_size, self.device, self.threads = batch_size, device, threads
        self.rank, self.processes = rank, processes
        self.sampler = EpochShuffle(split, seed)
        self.position = position or EpochPosition()

    def __len__(self) -> int:
        return len(self.split) // self.processes // self.batch_size

    def __iter__(self) -> Iterator[list]:
        # Nothing happens before the first batch is asked for: Lightning makes an iterator before it sets the
        # epoch, and another one after.
        yield from self.position.rest(self._batches())

    def _batches(self) -> Iterator[list]:
        share = list(self.sampler)[self.rank :: self.processes]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        batches = [share[start : start + self.batch_size] for start in starts]
        outputs = self._outputs(batches)
        for batch in batches:
            try:
                *views, indexes = next(outputs)
            # DALI's own errors are of several lines, and not all of them name the file.
            except RuntimeError as error:
                raise self._undecodable(batch, error) from None
            yield [indexes, views, self.split.labels[indexes]]

    def _outputs(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
        """What the pipeline gives, batch by batch."""
        # As a DataLoader draws the seed of its workers; each process has another.
        seeds = torch.empty(self.processes, dtype=torch.int64).random_(generator=self.sampler.worker_seeds)
        pipeline = dali_views(
            ((self._files(batch), np.array(batch, dtype=np.int64)) for batch in batches),
            self.entries,
            self.mean,
            self.std,
            self.device,
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=torch.cuda.current_device() if self.device == "gpu" else None,
            seed=int(seeds[self.rank]),
        )
        names = [f"view{i}" for i in range(sum(entry.num_crops for entry in self.entries))] + ["indexes"]
        for (outputs,) in DALIGenericIterator(pipeline, names, prepare_first_batch=False):
            yield [outputs[name] for name in names]

    def _files(self, batch: Sequence[int]) -> list[np.ndarray]:
        return [np.frombuffer(os.fsencode(self.split.paths[index]), dtype=np.uint8) for index in batch]

    def _undecodable(self, batch: Sequence[int], error: RuntimeError) -> UserError:
        """One line for a file of the batch that Pillow cannot read either, else with DALI's own reason."""
        for index in batch:
            try:
                self.split.image(index)
            except UserError as unreadable:
                return unreadable
        # DALI's reason stands between a traceback of the pipeline's definition and one of its own
        reason = " ".join(str(error).split()).rpartition("encountered: ")[2].partition(" C++ context")[0]
        return UserError(
            f"data.format must be image_folder where DALI fails on a batch, got 'dali': {reason}"
        )


def require_dali(split: ImageSplit, device: str) -> None:
    """Raises a :class:`UserError` unless DALI can make the training batches of ``split`` on ``device``."""
    choose("dali.device", device, DEVICES)
    check(
        isinstance(split, FileImages),
        "data.format",
        "image_folder for a data set that lies in memory",
        "dali",
        "DALI decodes image files: imagenet, imagenet100, tiny_imagenet, coco, custom",
    )
    for name, allowed, whole in (
        ("data.region", "full", type(split).image is FileImages.image),
        ("data.bits", "null", split.bits == 16),
    ):
        check(whole, name, f"{allowed} with data.format=dali", "another", "set data.format=image_folder")
    check(
        device == "cpu" or torch.cuda.is_available(),
        "dali.device",
        "cpu on a machine without CUDA",
        device,
        "set dali.device=cpu",
    )


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
        entries: see :func:`~metamask_plugin.data.views.parse_augmentations`.
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
    """:func:`~metamask_plugin.data.images.centre_square`, to the pixel where torchvision puts it."""
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
