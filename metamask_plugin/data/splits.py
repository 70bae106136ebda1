"""Labelled images with one interface, whether they lie in memory or in files; a data set of two splits."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metamask_plugin.data.images import (
    SkippedImage,
    UnreadableImage,
    centre_square,
    parallel_map,
    read_rgb,
    square_box,
)
from metamask_plugin.errors import check

# Beyond this so many, evenly spaced, stand for all: STL-10's 3 GB would take seconds at every start.
IMAGES_DIGESTED = 20_000


class ImageSplit(ABC):
    """A training or test split.

    Every tensor attribute has one row an image, so :meth:`subset` can treat them alike.

    Attributes:
        labels: class index of each image, int64, shape (N,); -1 where there is no label.
        classes: class names in the order of the labels.
        boxes: foreground box of each image, x0, y0, x1, y1 in pixels, half open, int32, shape (N, 4); or
            None.
        masks: foreground pixels, bool, shape (N, H, W); or None.
        originals: index of what each image shows, int64, shape (N,), where several show the same; or None.
    """

    labels: Tensor
    classes: list[str]
    boxes: Tensor | None = None
    masks: Tensor | None = None
    originals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """One image, RGB."""

    def subset(self, indices: Sequence[int] | Tensor) -> "ImageSplit":
        """The images at ``indices``, in that order, with everything that is known about them."""
        indices = torch.as_tensor(indices, dtype=torch.long)
        picked = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(picked, name, value[indices])
        return picked


class MemoryImages(ImageSplit):
    """Images of one size that lie in memory.

    Args:
        images: uint8, shape (N, 3, H, W).
        labels: shape (N,).
        classes: class names.
        boxes: see :class:`ImageSplit`.
        masks: see :class:`ImageSplit`.

    Raises:
        ValueError: on another dtype or shape.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor | Sequence[int],
        classes: Sequence[str],
        boxes: Tensor | None = None,
        masks: Tensor | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be uint8 of shape (N, 3, H, W), got {images.dtype} {tuple(images.shape)}"
            )
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        _require_rows(len(images), labels=self.labels, boxes=boxes, masks=masks)
        self.images = images
        self.classes = list(classes)
        self.boxes = boxes
        self.masks = masks

    def image(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index].permute(1, 2, 0).numpy())

    def batch(self, indices: Sequence[int] | Tensor) -> Tensor:
        """Several images in one index operation, uint8, shape (B, 3, H, W)."""
        return self.images[torch.as_tensor(indices, dtype=torch.long)]


class FileImages(ImageSplit):
    """Image files, decoded when asked for.

    Args:
        paths: one for each image, of whatever size.
        labels: shape (N,).
        classes: class names.
        boxes: see :class:`ImageSplit`, in pixels of the file.

    Attributes:
        paths: as given.
        bits: that 16-bit grey uses, see :func:`~metamask_plugin.data.images.read_rgb`.

    Raises:
        ValueError: another number of labels or boxes than of paths.
    """

    bits = 16

    def __init__(
        self,
        paths: Sequence[str],
        labels: Tensor | Sequence[int],
        classes: Sequence[str],
        boxes: Tensor | None = None,
    ) -> None:
        self.labels = torch.as_tensor(labels, dtype=torch.long)
        _require_rows(len(paths), labels=self.labels, boxes=boxes)
        self.paths = list(paths)
        self.classes = list(classes)
        self.boxes = boxes

    def image(self, index: int) -> Image.Image:
        """One image, RGB, as :func:`~metamask_plugin.data.images.read_rgb` decodes it.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return read_rgb(self.paths[index], self.bits)

    def subset(self, indices: Sequence[int] | Tensor) -> "FileImages":
        picked = super().subset(indices)
        picked.paths = [self.paths[i] for i in torch.as_tensor(indices).tolist()]
        return picked

    def to_memory(self, size: int, faults: dict[int, str] | None = None) -> MemoryImages:
        """Decodes everything: shorter side resized to ``size`` (bicubic), then the centre square.

        Boxes are moved along; of one that lies outside the square, the nearest pixel stays.

        Args:
            size: height and width in pixels.
            faults: is filled with the reasons why files cannot be decoded, by index; their images are black.

        Raises:
            UnreadableImage: a file cannot be decoded, and ``faults`` is not given.
        """
        images = torch.zeros(len(self), 3, size, size, dtype=torch.uint8)
        boxes = None if self.boxes is None else torch.zeros(len(self), 4, dtype=torch.int32)

        def decode(index: int) -> str | None:
            try:
                image = self.image(index)
            except UnreadableImage as error:
                if faults is None:
                    raise
                return error.reason
            square = centre_square(image, size)
            images[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
            if boxes is not None:
                boxes[index] = torch.tensor(square_box(self.boxes[index].tolist(), *image.size, size))
            return None

        unreadable = parallel_map(decode, len(self), "decoding")
        if faults is not None:
            faults.update(unreadable)
        return MemoryImages(images, self.labels, self.classes, boxes)


def _require_rows(count: int, **rows: Tensor | None) -> None:
    for name, given in rows.items():
        if given is not None and len(given) != count:
            raise ValueError(f"{name} must have one row for each of {count} images, got {len(given)}")


def stratified_subset(split: ImageSplit, fraction: float, seed: int) -> ImageSplit:
    """The same share of every class, at least one image of each, in the order of the split.

    Args:
        split: what to choose from. Images without label (-1) count as a class of their own.
        fraction: share to keep, in (0, 1).
        seed: which images are kept is a function of it alone.

    Raises:
        UserError: ``fraction`` lies outside (0, 1).
    """
    check(0 < fraction < 1, "data.fraction", "between 0 and 1 (or -1 for all images)", fraction)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(split), generator=generator)
    by_class = shuffled[torch.argsort(split.labels[shuffled], stable=True)]
    _, counts = torch.unique(split.labels, return_counts=True)
    rank_in_class = torch.cat([torch.arange(count) for count in counts.tolist()])
    keep = torch.round(counts * fraction).clamp(min=1).repeat_interleave(counts)
    return split.subset(by_class[rank_in_class < keep].sort().values)


Splits = tuple[ImageSplit, ImageSplit | None]
"""Training and test images."""


@dataclass(frozen=True)
class Dataset:
    """A data set, ready to make views of.

    Attributes:
        name: as in ``data.dataset``.
        train: training images.
        test: held-out images, or None.
        num_classes: at least 1, also where nothing is labelled.
        mean: per channel, images in [0, 1].
        std: per channel.
        skipped: what was left out as it cannot be read, where ``data.invalid_images`` is ``skip``.
    """

    name: str
    train: ImageSplit
    test: ImageSplit | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[SkippedImage, ...] = ()

    @property
    def splits(self) -> dict[str, ImageSplit]:
        """``train`` and, where there is one, ``test``."""
        splits = {"train": self.train, "test": self.test}
        return {name: split for name, split in splits.items() if split is not None}

    def fingerprint(self) -> str:
        """A short hash of the training images, see :func:`fingerprint`."""
        return fingerprint(self.train)


def fingerprint(split: ImageSplit) -> str:
    """Hash of the number of images, the class names, the labels, the boxes, and which images they are.

    By it a resumed run knows that it goes on with the same images. Files are known by their paths below the
    folder that holds them all, wherever that lies: one that was replaced under its own name is not noticed.
    Images in memory are known by their pixels.

    Args:
        split: of whatever kind.

    Returns:
        16 hexadecimal digits.
    """
    digest = hashlib.sha256(repr((len(split), list(split.classes))).encode(errors="surrogateescape"))
    digest.update(split.labels.numpy().astype("<i8").tobytes())
    if split.boxes is not None:  # data.region shows what is inside, or outside
        digest.update(split.boxes.numpy().astype("<i4").tobytes())
    if isinstance(split, FileImages):
        digest.update("\0".join(_below_their_folder(split.paths)).encode(errors="surrogateescape"))
    elif isinstance(split, MemoryImages):
        digest.update(repr(tuple(split.images.shape)).encode())
        step = -(-len(split) // IMAGES_DIGESTED) or 1
        digest.update(np.ascontiguousarray(split.images[::step].numpy()))
    return digest.hexdigest()[:16]


def _below_their_folder(paths: list[str]) -> list[str]:
    folders = {os.path.dirname(path) for path in paths}
    common = len(os.path.commonpath(folders)) if folders else 0
    return [path[common:].lstrip(os.sep).replace(os.sep, "/") for path in paths]
