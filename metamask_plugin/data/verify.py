"""Image files verified before a training, and what becomes of those that cannot be read.

``data.verify`` says how: ``header`` opens every file and looks at its header and its end, ``decode`` also
decodes it, which finds damage in the middle (see :func:`~metamask_plugin.data.images.fault`); ``none`` leaves
it to the training. ``data.invalid_images`` says what then: ``stop`` ends with one line before anything is
trained; ``skip`` goes on without them. ``metamask-ssl verify`` lists them all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
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


def policy(data: Mapping[str, Any]) -> tuple[str, bool]:
    """How files are verified, one of :data:`LEVELS`, and whether to go on without those that cannot be read.

    Args:
        data: the ``data`` node; ``verify`` is ``header`` by default, with ``invalid_images=skip`` ``decode``.

    Raises:
        UserError: an unknown value, or nothing to be verified and yet skipped.
    """
    skip = choose("data.invalid_images", data.get("invalid_images") or "stop", ON_INVALID) == "skip"
    level = data.get("verify")
    if level is None:
        level = "decode" if skip else "header"
    level = choose("data.verify", "none" if level is False else level, LEVELS)  # False is YAML's "no"
    wanted = "header or decode with data.invalid_images=skip"
    check(not skip or level != "none", "data.verify", wanted, level)
    return level, skip


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
    level, skip = policy(data)
    seen = in_region(dataset, data.get("region") or "full", data.get("region_form") or "fill")
    files = {name: split for name, split in seen.splits.items() if isinstance(split, FileImages)}
    memory: dict[str, MemoryImages] = {}
    faults: dict[str, dict[int, str]] = {}
    for name, split in files.items():
        faults[name] = {}
        if in_memory:
            memory[name] = split.to_memory(size, faults[name])
        else:
            faults[name] = unreadable(split, level, f"verifying {name} images")
    found = tuple(
        SkippedImage(files[name].paths[index], reason)
        for name, at_fault in faults.items()
        for index, reason in at_fault.items()
    )
    if found and not skip:
        raise _invalid(found, sum(len(split) for split in files.values()), dataset.name)
    kept = {name: _readable(name, files[name], at_fault) for name, at_fault in faults.items() if at_fault}
    if found:
        tell(f"warning: left out {len(found)} images that cannot be read, the first {found[0]}")
    dataset, seen = (
        replace(of, skipped=found, **{name: of.splits[name].subset(rows) for name, rows in kept.items()})
        for of in (dataset, replace(seen, **memory))
    )
    for name in files:
        tell_unused_bits(name, dataset.splits[name])
    return dataset, seen


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


def _invalid(images: Sequence[SkippedImage], of: int, name: str) -> InvalidImages:
    skip = "or set data.invalid_images=skip to go on without"
    if len(images) == 1:
        message = (
            f"image file {printable(images[0].path)} must be readable, got {images[0].reason}; replace or "
            f"delete it, {skip} (it is the only one of {of} in {name})"
        )
    else:
        message = (
            f"the images of {name} must be readable, got {len(images)} of {of} that are not, the first "
            f"{images[0]}; replace or delete them (metamask-ssl verify <folder> --decode lists all), {skip}"
        )
    return InvalidImages(message, images)


def _readable(name: str, split: ImageSplit, at_fault: Mapping[int, str]) -> torch.Tensor:
    """Indexes of the images that can be read.

    Raises:
        UserError: they are less than half, or none of a class.
    """
    keep = torch.ones(len(split), dtype=torch.bool)
    keep[list(at_fault)] = False
    if len(at_fault) > MOST_SKIPPED * len(split):
        raise UserError(
            "data.invalid_images must be stop where more than half of the images cannot be read, got 'skip' "
            f"and {len(at_fault)} of {len(split)} {name} images that cannot; correct the path or fetch the "
            "images anew"
        )
    lost = sorted(set(split.labels.tolist()) - set(split.labels[keep].tolist()))
    if lost:
        label = split.classes[lost[0]] if split.classes else lost[0]
        raise UserError(
            f"data.invalid_images must leave every class an image, got 'skip' and {len(lost)} classes of the "
            f"{name} images without a readable one, the first {label!r}; replace its images or remove it"
        )
    return keep.nonzero().flatten()
