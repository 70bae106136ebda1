"""Image splits: labelled images with one interface, whether they lie in memory or in a folder."""

import copy
import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision
from tqdm import tqdm

from metamask_plugin.data.boxes import square_box
from metamask_plugin.errors import UserError, check

# Below this a progress bar flickers by before it can be read.
PROGRESS_FROM = 2000


class UnreadableImage(UserError):
    """An image file that cannot be decoded.

    A ``DataLoader`` worker re-raises its exceptions as ``type(error)(<whole traceback>)``; only the last
    line, which is the one meant for the user, is kept.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message.strip().splitlines()[-1].rpartition(f"{type(self).__name__}: ")[2])


class ImageSplit(ABC):
    """A training or test split.

    Every tensor attribute has one row an image, so :meth:`subset` can treat them alike.

    Attributes:
        labels: class index of each image, int64, shape (N,); -1 where there is no label.
        classes: class names in the order of the labels.
        boxes: foreground box of each image, x0, y0, x1, y1 in pixels, half open, int32, shape (N, 4); or
            None.
        masks: foreground pixels, bool, shape (N, H, W); or None.
    """

    labels: Tensor
    classes: list[str]
    boxes: Tensor | None = None
    masks: Tensor | None = None

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

    Raises:
        ValueError: another number of labels or boxes than of paths.
    """

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
        path = self.paths[index]
        try:
            with open(path, "rb") as file:
                return Image.open(file).convert("RGB")
        # Pillow signals a broken file by OSError, SyntaxError (PNG), ValueError or its own bomb error.
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())
            raise UnreadableImage(
                f"image file {path} must be readable, got {type(error).__name__}: {reason}; "
                "replace or delete it"
            ) from None

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
            UserError: a file cannot be decoded.
        """
        images = torch.empty(len(self), 3, size, size, dtype=torch.uint8)
        boxes = None if self.boxes is None else torch.empty(len(self), 4, dtype=torch.int32)

        def decode(index: int) -> None:
            image = self.image(index)
            square = centre_square(image, size)
            images[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
            if boxes is not None:
                boxes[index] = torch.tensor(square_box(self.boxes[index].tolist(), *image.size, size))

        with ThreadPoolExecutor(threads) as pool:
            done = pool.map(decode, range(len(self)))
            hidden = len(self) <= PROGRESS_FROM or not sys.stderr.isatty()
            progress = tqdm(done, "decoding", len(self), unit="image", disable=hidden)
            try:
                for _ in progress:
                    pass
            except UserError:
                # Otherwise leaving the pool first decodes all the images that are still queued.
                pool.shutdown(cancel_futures=True)
                raise
        return MemoryImages(images, self.labels, self.classes, boxes)


class FolderImages(FileImages):
    """Image files in class folders: ``<root>/<class>/*.jpg`` and what else torchvision reads.

    Args:
        root: folder that holds one folder a class. Images deeper inside a class folder count, as in
            torchvision's ``ImageFolder``; hidden folders do not.

    Raises:
        UserError: the folder is missing or unreadable, has no class folders, or a class has no images.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        classes = sorted(entry.name for entry in listing(root) if entry.is_dir() and entry.name[0] != ".")
        check(
            bool(classes),
            f"image folder {root}",
            "a folder of class folders (<class>/*.jpg)",
            "no class folders",
            "move the images into one folder a class, or set data.dataset=custom data.no_labels=True",
        )
        refuse_folder_of_splits(root, classes)
        for name in classes:
            listing(root / name)
        # torchvision's check for empty classes is switched off: its message is many lines for many classes.
        samples = make_dataset(
            root, {name: i for i, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True
        )
        super().__init__([path for path, _ in samples], [label for _, label in samples], classes)
        self._refuse_empty_classes(root)

    @classmethod
    def unlabelled(cls, root: str | Path) -> "FolderImages":
        """All images below ``root``, with label -1 and no classes.

        Raises:
            UserError: the folder is missing, unreadable or without images.
        """
        root = Path(root)
        listing(root)
        split = cls.__new__(cls)
        split.paths = sorted(str(path) for path in root.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
        check(
            bool(split.paths),
            f"image folder {root}",
            f"a folder of images ({', '.join(IMG_EXTENSIONS)})",
            "no images",
            "point data.train_path at the folder that holds them",
        )
        split.labels = torch.full((len(split.paths),), -1)
        split.classes = []
        return split

    def _refuse_empty_classes(self, root: Path) -> None:
        counts = torch.bincount(self.labels, minlength=len(self.classes)).tolist()
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        check(
            not empty,
            f"image folder {root}",
            f"filled with images in each of its {len(self.classes)} class folders",
            f"no image in {len(empty)} of them, the first {root / empty[0] if empty else ''}",
            "fill or remove the empty folders",
        )


def centre_square(image: Image.Image, size: int) -> Image.Image:
    """The image's centre, ``size`` pixels square, after its shorter side was resized to that (bicubic)."""
    if min(image.size) != size:
        image = vision.resize(image, size, InterpolationMode.BICUBIC)
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
    return any(entry.suffix.lower() in IMG_EXTENSIONS for entry in listing(folder))


def refuse_missing_files(source: Path, paths: Sequence[str]) -> None:
    """One line for all the ``paths`` that are named in the file ``source`` and not there."""
    missing = [path for path in paths if not os.path.isfile(path)]
    check(
        not missing,
        f"the {len(paths)} images of {source}",
        "files in the image folder",
        f"{len(missing)} missing, the first {missing[0] if missing else ''}",
        "correct the image folder or complete it",
    )


def _require_rows(count: int, **rows: Tensor | None) -> None:
    for name, given in rows.items():
        if given is not None and len(given) != count:
            raise ValueError(f"{name} must have one row for each of {count} images, got {len(given)}")


def listing(folder: Path) -> list[Path]:
    """What lies in ``folder``; one clear line where that cannot be found out."""
    try:
        return list(folder.iterdir())
    except FileNotFoundError:
        found, remedy = "no such folder", "correct data.train_path or data.val_path"
    except NotADirectoryError:
        found, remedy = "a file", "name the folder that holds the class folders"
    except PermissionError:
        found, remedy = "no permission to read it", f"run: chmod u+rx {folder}"
    raise UserError(f"image folder {folder} must be a readable folder, got {found}; {remedy}")


def refuse_folder_of_splits(root: Path, classes: list[str]) -> None:
    """torchvision would take ``train`` and ``test`` for two classes, and the training would run on that."""
    test = next((name for name in ("test", "val") if name in classes), None)
    if "train" in classes and test:
        raise UserError(
            f"image folder {root} must be a folder of class folders, got the splits {', '.join(classes)}; "
            f"set data.train_path={root / 'train'} data.val_path={root / test}"
        )
