"""Image splits: labelled images with one interface, whether they lie in memory or in a folder."""

import copy
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from metamask_plugin.data.boxes import square_box
from metamask_plugin.data.each_image import each_image
from metamask_plugin.data.image_file import WHOLE, read_rgb
from metamask_plugin.data.image_tree import (
    Listing,
    extensions,
    image_files,
    images_by_content,
    is_folder,
    is_hidden,
    is_image_name,
    listing,
    lost_folder,
)
from metamask_plugin.data.unreadable import SkippedImage, UnreadableImage, printable
from metamask_plugin.errors import UserError, check


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
        faults: what could not be listed when the images were looked for.
        hidden: image files that were left out as hidden, or as a desktop's or a file server's.
        others: files beside the images whose names are not those of images.
    """

    labels: Tensor
    classes: list[str]
    boxes: Tensor | None = None
    masks: Tensor | None = None
    originals: Tensor | None = None
    faults: tuple[SkippedImage, ...] = ()
    hidden: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

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
        reading: how they are decoded.
        verified: how the files were verified, a level of :mod:`~metamask_plugin.data.verify`.

    Raises:
        ValueError: another number of labels or boxes than of paths.
    """

    verified = "none"
    reading = WHOLE

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
        """One image, RGB, as :func:`~metamask_plugin.data.image_file.read_rgb` decodes it.

        Raises:
            UnreadableImage: it cannot be decoded.
        """
        return read_rgb(self.paths[index], self.reading)

    def read_with(self, **changes: Any) -> "FileImages":
        """The same files with other fields of ``reading``."""
        changed = copy.copy(self)
        changed.reading = replace(self.reading, **changes)
        return changed

    def subset(self, indices: Sequence[int] | Tensor) -> "FileImages":
        picked = super().subset(indices)
        picked.paths = [self.paths[i] for i in torch.as_tensor(indices).tolist()]
        return picked

    def to_memory(self, size: int, threads: int = 4) -> MemoryImages:
        """Decodes everything: shorter side resized to ``size`` (bicubic), then the centre square.

        Boxes are moved along; of one that lies outside the square, the nearest pixel stays.

        Args:
            size: height and width in pixels.
            threads: decoders that run at once; Pillow releases the GIL while it decodes.

        Raises:
            UnreadableImage: a file cannot be decoded.
        """
        decoded, unreadable = self.decode(size, threads)
        for error in unreadable.values():
            raise error
        return decoded

    def decode(self, size: int, threads: int = 4) -> tuple[MemoryImages, dict[int, UnreadableImage]]:
        """As :meth:`to_memory`, but goes on where a file cannot be decoded.

        Returns:
            all images, black in place of an unreadable one; and by index why it is that.
        """
        bounded = self.read_with(side=max(size, self.reading.side))
        images = torch.zeros(len(self), 3, size, size, dtype=torch.uint8)
        boxes = None if self.boxes is None else torch.zeros(len(self), 4, dtype=torch.int32)

        def decode(index: int) -> UnreadableImage | None:
            try:
                image = bounded.image(index)
            except UnreadableImage as error:
                return error
            square = centre_square(image, size)
            images[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
            if boxes is not None:
                boxes[index] = torch.tensor(square_box(self.boxes[index].tolist(), *image.size, size))
            return None

        unreadable = each_image(len(self), decode, "decoding", threads)
        return MemoryImages(images, self.labels, self.classes, boxes), unreadable


class FolderImages(FileImages):
    """Image files in class folders: ``<root>/<class>/*.jpg`` and what else Pillow reads.

    Folders inside a class folder that cannot be listed, and links that lead nowhere or back to a folder they
    are in, are left out and stand in ``faults``.

    Args:
        root: folder that holds one folder a class. Images deeper inside a class folder count, as in
            torchvision's ``ImageFolder``; hidden files and folders do not, see
            :func:`~metamask_plugin.data.image_tree.is_hidden`.

    Raises:
        UserError: the folder is missing, has no class folders, or a class has no images; it or a class folder
            is unreadable or a link that leads nowhere.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        entries = listing(root)
        lost = next((lost for lost in map(lost_folder, entries) if lost), None)
        if lost is not None:  # one class less would be another task
            raise UserError(
                f"image folder {printable(root)} must be a folder of class folders, got {lost}; "
                "mend the link or remove it"
            )
        folders = [entry for entry in entries if is_folder(entry)]
        classes = sorted(entry.name for entry in folders if not is_hidden(entry.name))
        check(
            bool(classes),
            f"image folder {printable(root)}",
            "a folder of class folders (<class>/*.jpg)",
            "no class folders",
            "move the images into one folder a class, or set data.dataset=custom data.no_labels=True",
        )
        refuse_folder_of_splits(root, classes)
        found = []
        for name in classes:
            listing(root / name)
            found.append(image_files(root / name, root))
        labels = [label for label, inside in enumerate(found) for _ in inside.paths]
        super().__init__([path for inside in found for path in inside.paths], labels, classes)
        self._note(found)
        hidden = [image_files(entry) for entry in folders if is_hidden(entry.name)]
        self.hidden += tuple(path for inside in hidden for path in (*inside.paths, *inside.hidden))
        self._refuse_empty_classes(root)

    @classmethod
    def unlabelled(cls, root: str | Path) -> "FolderImages":
        """All images below ``root``, with label -1 and no classes, in the order of their paths.

        Raises:
            UserError: the folder is missing, unreadable or without images.
        """
        root = Path(root)
        listing(root)
        split = cls.__new__(cls)
        found = image_files(root)
        split.paths = sorted(found.paths)
        split._note([found])
        check(
            bool(split.paths),
            f"image folder {printable(root)}",
            f"a folder of images ({', '.join(extensions())})",
            "no images",
            "point data.train_path at the folder that holds them",
        )
        split.labels = torch.full((len(split.paths),), -1)
        split.classes = []
        return split

    def _note(self, found: Iterable[Listing]) -> None:
        """Keeps what was found besides the images."""
        for name in ("faults", "hidden", "others"):
            setattr(self, name, tuple(path for listing in found for path in getattr(listing, name)))

    def _refuse_empty_classes(self, root: Path) -> None:
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            first = root / empty[0]
            reason = self._why_empty(first)
            raise UserError(
                f"image folder {printable(root)} must be filled with images in each of its "
                f"{len(self.classes)} class folders, got 'no image in {len(empty)} of them, the first "
                f"{printable(first)}'" + (f" ({reason})" if reason else "") + "; fill or remove the empty "
                "folders"
            )

    def _why_empty(self, folder: Path) -> str:
        """What lies in a folder without images; a folder that could not be listed is another matter."""
        unlisted = [fault for fault in self.faults if Path(fault.path).is_relative_to(folder)]
        if unlisted:
            return str(unlisted[0])
        unnamed, _ = images_by_content(path for path in self.others if Path(path).is_relative_to(folder))
        if unnamed:
            first = printable(unnamed[0])
            return f"{len(unnamed)} files begin like images and have another extension, the first {first}"
        hidden = [path for path in self.hidden if Path(path).is_relative_to(folder)]
        return f"{len(hidden)} images are hidden, the first {printable(hidden[0])}" if hidden else ""


def centre_square(image: Image.Image, size: int, resize: int | None = None) -> Image.Image:
    """The image's centre, ``size`` pixels square, after its shorter side was resized (bicubic).

    Args:
        image: of any size.
        size: height and width of the result.
        resize: pixels of the resized shorter side; ``size`` by default, which keeps all of it.
    """
    resize = resize or size
    if min(image.size) != resize:
        image = vision.resize(image, resize, InterpolationMode.BICUBIC)
    return vision.center_crop(image, [size, size])


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


def holds_image(folder: Path) -> bool:
    """Whether an image file lies in ``folder`` itself."""
    return any(is_image_name(entry.name) for entry in listing(folder))


def refuse_missing_files(source: Path, paths: Sequence[str]) -> None:
    """One line for all the ``paths`` that are named in the file ``source`` and not there."""
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise UserError(
            f"the {len(paths)} images of {printable(source)} must be files in the image folder, got "
            f"'{len(missing)} missing, the first {printable(missing[0])}'; correct the image folder or "
            "complete it"
        )


def _require_rows(count: int, **rows: Tensor | None) -> None:
    for name, given in rows.items():
        if given is not None and len(given) != count:
            raise ValueError(f"{name} must have one row for each of {count} images, got {len(given)}")


def refuse_folder_of_splits(root: Path, classes: list[str]) -> None:
    """torchvision would take ``train`` and ``test`` for two classes, and the training would run on that."""
    test = next((name for name in ("test", "val") if name in classes), None)
    if "train" in classes and test:
        raise UserError(
            f"image folder {printable(root)} must be a folder of class folders, got the splits "
            f"{printable(', '.join(classes))}; set data.train_path={printable(root / 'train')} "
            f"data.val_path={printable(root / test)}"
        )
