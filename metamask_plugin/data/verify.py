"""Image files verified before a training, and what becomes of those that cannot be read.

``data.verify`` says how: ``header`` opens every file and looks at its header and its end, ``decode`` also
decodes it, which finds damage in the middle (see :func:`~metamask_plugin.data.images.fault`); ``none`` leaves
it to the training. ``data.invalid_images`` says what then: ``stop`` ends with one line before anything is
trained; ``skip`` goes on without them. ``metamask-ssl verify`` lists them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from metamask_plugin.data.images import SkippedImage, fault, parallel_map
from metamask_plugin.data.regions import in_region
from metamask_plugin.data.remarks import tell, tell_unused_bits
from metamask_plugin.data.splits import Dataset, FileImages, ImageSplit, MemoryImages
from metamask_plugin.errors import UserError, check, choose, printable

LEVELS = ("none", "header", "decode")
"""Each finds what the one before it finds."""
ON_INVALID = ("stop", "skip")
# Of images of which more are missing than there, the path was wrong or the download has failed.
MOST_SKIPPED = 0.5


class InvalidImages(UserError):
    """Image files that cannot be read, found before a training.

    Attributes:
        images: all of them.
    """

    def __init__(self, message: str, images: Sequence[SkippedImage] = ()) -> None:
        super().__init__(message)
        self.images = tuple(images)


@dataclass(frozen=True)
class Verification:
    """How image files are verified, and whether the run goes on without those that cannot be read.

    Attributes:
        level: one of :data:`LEVELS`.
        skip: whether to go on.
    """

    level: str = "header"
    skip: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> "Verification":
        """From the ``data`` node: ``invalid_images``, and ``verify`` (``header``; with ``skip``, ``decode``).

        Raises:
            UserError: an unknown value, or nothing to be verified and yet skipped.
        """
        on_invalid = choose("data.invalid_images", data.get("invalid_images") or "stop", ON_INVALID)
        given = data.get("verify")
        if given in (None, False):  # YAML's "no", and nothing at all
            given = "none" if given is False else ("decode" if on_invalid == "skip" else "header")
        level = choose("data.verify", given, LEVELS)
        skip = on_invalid == "skip"
        check(
            not skip or level != "none",
            "data.verify",
            "header or decode with data.invalid_images=skip",
            level,
        )
        return cls(level, skip)


def prepared(
    dataset: Dataset, data: Mapping[str, Any], size: int, in_memory: bool
) -> tuple[Dataset, Dataset]:
    """The data set after its files were verified, or decoded into memory.

    Args:
        dataset: as loaded.
        data: the ``data`` node; read are ``verify``, ``invalid_images``, ``region`` and ``region_form``.
        size: side of the images in memory, pixels.
        in_memory: whether image files are decoded, which verifies them, too.

    Returns:
        the data set with full images (files stay files), and with the region that is to be seen of them.

    Raises:
        InvalidImages: files that cannot be read, all in one line.
        UserError: too many to be skipped, or an unknown setting.
    """
    how = Verification.of(data)
    seen = in_region(dataset, data.get("region") or "full", data.get("region_form") or "fill")
    files = {name: split for name, split in seen.splits.items() if isinstance(split, FileImages)}
    memory: dict[str, MemoryImages] = {}
    faults: dict[str, dict[int, str]] = {}
    for name, split in files.items():
        if in_memory:
            memory[name], errors = split.decode(size)
            faults[name] = {index: error.reason for index, error in errors.items()}
        else:
            faults[name] = unreadable(split, how.level, f"verifying {name} images")
    kept = _kept(dataset, faults, how)
    full = _subsets(dataset, kept)
    seen = _subsets(replace(seen, **memory), kept)
    for name in files:
        tell_unused_bits(name, full.splits[name])
    skipped = tuple(
        SkippedImage(split.paths[index], reason)
        for name, split in files.items()
        for index, reason in faults[name].items()
    )
    return replace(full, skipped=skipped), replace(seen, skipped=skipped)


def unreadable(split: FileImages, level: str, title: str = "verifying") -> dict[int, str]:
    """Why files cannot be read, by index.

    Args:
        split: image files.
        level: one of :data:`LEVELS`.
        title: of the progress bar that many images have.

    Raises:
        MachineFault: the disk or the network fails, again and again.
    """
    if level == "none":
        return {}
    return parallel_map(
        lambda index: fault(split.paths[index], level == "decode", split.bits), len(split), title
    )


def _kept(
    dataset: Dataset, faults: Mapping[str, Mapping[int, str]], how: Verification
) -> dict[str, torch.Tensor]:
    """Indexes of the images that can be read, for each split where some cannot.

    Raises:
        InvalidImages: there are any, and they are not to be skipped.
        UserError: more than half of a split are at fault, or all images of a class.
    """
    splits = dataset.splits
    found = [
        SkippedImage(splits[name].paths[index], reason)
        for name, at_fault in faults.items()
        for index, reason in at_fault.items()
    ]
    if not found:
        return {}
    if not how.skip:
        _refuse(found, sum(len(splits[name]) for name in faults), dataset.name)
    kept = {}
    for name, at_fault in faults.items():
        if at_fault:
            keep = torch.ones(len(splits[name]), dtype=torch.bool)
            keep[list(at_fault)] = False
            kept[name] = keep.nonzero().flatten()
            _refuse_too_many(name, splits[name], kept[name])
    tell(f"warning: left out {len(found)} images that cannot be read, the first {found[0]}")
    return kept


def _subsets(dataset: Dataset, kept: Mapping[str, torch.Tensor]) -> Dataset:
    return replace(dataset, **{name: dataset.splits[name].subset(rows) for name, rows in kept.items()})


def _refuse(images: Sequence[SkippedImage], of: int, name: str) -> None:
    skip = "or set data.invalid_images=skip to go on without"
    if len(images) == 1:
        raise InvalidImages(
            f"image file {printable(images[0].path)} must be readable, got {images[0].reason}; replace or "
            f"delete it, {skip} (it is the only one of {of} in {name})",
            images,
        )
    raise InvalidImages(
        f"the images of {name} must be readable, got {len(images)} of {of} that are not, the first "
        f"{images[0]}; replace or delete them (metamask-ssl verify <folder> --decode lists all), {skip} them",
        images,
    )


def _refuse_too_many(name: str, split: ImageSplit, keep: torch.Tensor) -> None:
    skipped = len(split) - len(keep)
    if skipped > MOST_SKIPPED * len(split):
        raise UserError(
            "data.invalid_images must be stop where more than half of the images cannot be read, got 'skip' "
            f"and {skipped} of {len(split)} {name} images that cannot; correct the path or fetch the images "
            "anew"
        )
    lost = sorted(set(split.labels.tolist()) - set(split.labels[keep].tolist()))
    if lost:
        label = split.classes[lost[0]] if split.classes else lost[0]
        raise UserError(
            f"data.invalid_images must leave every class an image, got 'skip' and {len(lost)} classes of the "
            f"{name} images without a readable one, the first {label!r}; replace its images or remove it"
        )
