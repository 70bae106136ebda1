"""Image files verified before a training, and what becomes of those that cannot be read.

``data.verify`` says how: ``header`` opens every file and looks at its header and its end, see
:func:`~metamask_plugin.data.image_file.header_fault`; ``decode`` decodes every file whole, which finds damage
in the middle, too; ``none`` leaves it to the training. ``data.invalid_images`` says what then: ``stop`` ends
with one line before anything is trained; ``skip`` goes on without them. Many files that were verified
before and have not changed since are not opened again, see :mod:`~metamask_plugin.data.verified_before`.
``metamask-ssl verify`` lists them all.
"""

import copy
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from metamask_plugin.data.each_image import each_image
from metamask_plugin.data.image_file import WHOLE, Reading, decode_fault, header_fault
from metamask_plugin.data.remarks import tell_unused_bits
from metamask_plugin.data.splits import FileImages, ImageSplit, MemoryImages
from metamask_plugin.data.unreadable import InvalidImages, SkippedImage, printable
from metamask_plugin.data.verified_before import remembered
from metamask_plugin.errors import UserError, check, choose

if TYPE_CHECKING:
    from metamask_plugin.data.registry import Dataset

LEVELS = ("none", "header", "decode")
"""Each finds what the one before it finds."""
ON_INVALID = ("stop", "skip")
# Reading waits for the disk, or for a file server, more than it computes.
THREADS = 8
# Of images of which more are missing than there, the path was wrong or the download has failed.
MOST_SKIPPED = 0.5
LIST = "metamask-ssl verify <folder> --decode"

Faults = Mapping[str, Mapping[int, str]]
"""Reasons by split (``train``, ``test``) and index."""


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
    dataset: "Dataset", data: Mapping[str, Any], size: int, in_memory: bool
) -> tuple["Dataset", "Dataset"]:
    """The data set after its files were verified, or decoded into memory.

    Args:
        dataset: as loaded.
        data: the ``data`` node; read are ``verify``, ``invalid_images``, ``region`` and ``region_form``.
        size: pixels that the shorter side of an image is resized to, at most.
        in_memory: whether image files are decoded.

    Returns:
        the data set with full images, and with the region that is to be seen of them.

    Raises:
        InvalidImages: files that cannot be read, all in one line.
        UserError: too many to be skipped, or an unknown setting.
    """
    how = Verification.of(data)
    full = dataset.files_with(side=size)
    if not in_memory:  # else decoding verifies
        full = verified(full, how)
    shown = full.in_region(data.get("region") or "full", data.get("region_form") or "fill")
    return decoded(full, shown, size, how) if in_memory else (full, shown)


def verified(dataset: "Dataset", how: Verification) -> "Dataset":
    """The data set after its files were verified; with ``skip``, without those that cannot be read.

    Images in memory, and files that were verified as thoroughly before, are left alone.

    Raises:
        InvalidImages: files that cannot be read, all in one line.
        UserError: too many to be skipped.
    """
    faults = {}
    for name, split in dataset.splits.items():
        if isinstance(split, FileImages) and LEVELS.index(split.verified) < LEVELS.index(how.level):
            faults[name] = _faults(name, split, how.level)
    dataset = without(dataset, faults, how)
    for name in faults:
        tell_unused_bits(name, getattr(dataset, name))
    return replace(dataset, **{name: _marked(getattr(dataset, name), how.level) for name in faults})


def decoded(
    dataset: "Dataset", shown: "Dataset", size: int, how: Verification
) -> tuple["Dataset", "Dataset"]:
    """Decodes all image files into memory, which verifies them at once.

    Args:
        dataset: with whole images.
        shown: the same images, or the same region of each, which are to be decoded.
        size: see :meth:`~metamask_plugin.data.splits.FileImages.to_memory`.
        how: whether to skip what cannot be decoded.

    Returns:
        ``dataset`` and ``shown`` in memory, both without what was skipped.

    Raises:
        InvalidImages: files that cannot be decoded, all in one line.
        UserError: too many to be skipped.
    """
    memory: dict[str, MemoryImages] = {}
    faults: dict[str, dict[int, str]] = {}
    for name, split in shown.splits.items():
        if isinstance(split, FileImages):
            rank_zero_info(
                f"data.pipeline=kornia: decoding {len(split)} {name} images to {size} x {size} in memory "
                f"({len(split) * 3 * size * size / 1e6:.0f} MB)"
            )
            memory[name], errors = split.decode(size)
            faults[name] = {index: error.reason for index, error in errors.items()}
            tell_unused_bits(name, split)
    whole = without(dataset, faults, how)
    for name, images in memory.items():
        if faults[name]:
            memory[name] = images.subset(_kept(len(images), faults[name]))
    whole = replace(whole, **{name: _marked(getattr(whole, name), "decode") for name in memory})
    return whole, replace(shown, skipped=whole.skipped, **memory)


def unreadable(
    paths: list[str], level: str, title: str = "verifying", reading: Reading = WHOLE
) -> dict[int, str]:
    """Why files cannot be read, by index.

    Args:
        paths: image files.
        level: one of :data:`LEVELS`.
        title: of the progress bar that many images have.
        reading: how they are to be read.

    Raises:
        MachineFault: the disk or the network fails, again and again, or memory is exhausted.
    """
    if level == "none":
        return {}
    fault = header_fault if level == "header" else decode_fault
    return each_image(len(paths), lambda index: fault(paths[index], reading), title, THREADS)


def without(dataset: "Dataset", faults: Faults, how: Verification) -> "Dataset":
    """``dataset`` without the images at fault, which are added to its ``skipped``.

    Raises:
        InvalidImages: there are any, and they are not to be skipped.
        UserError: more than half of a split are at fault, or all images of a class.
    """
    splits = dataset.splits
    found = {
        name: [SkippedImage(splits[name].paths[index], reason) for index, reason in at_fault.items()]
        for name, at_fault in faults.items()
        if at_fault
    }
    everything = tuple(image for images in found.values() for image in images)
    if not everything:
        return dataset
    if not how.skip:
        refuse(everything, sum(len(splits[name]) for name in faults), dataset.name)
    kept = {}
    for name, images in found.items():
        split = splits[name]
        keep = _kept(len(split), faults[name])
        _refuse_too_many(name, split, keep, images[0])
        kept[name] = split.subset(keep)
    tell_skipped(everything)
    return replace(dataset, skipped=(*dataset.skipped, *everything), **kept)


def refuse(images: Iterable[SkippedImage], of: int, name: str) -> None:
    """Raises :class:`InvalidImages` with the count, the first, and how to get the list."""
    images = tuple(images)
    skip = "or set data.invalid_images=skip to go on without"
    if len(images) == 1:
        raise InvalidImages(
            f"image file {printable(images[0].path)} must be readable, got {images[0].reason}; replace or "
            f"delete it, {skip} (it is the only one of {of} in {name})",
            images,
        )
    raise InvalidImages(
        f"the images of {name} must be readable, got {len(images)} of {of} that are not, the first "
        f"{images[0]}; replace or delete them ({LIST} lists them), {skip} them",
        images,
    )


def accept_unlisted(faults: tuple[SkippedImage, ...], name: str, how: Verification) -> None:
    """What becomes of folders and links that could not be followed when the images of ``name`` were listed.

    Raises:
        InvalidImages: they are not to be skipped.
    """
    if how.skip:
        return tell_skipped(faults)
    raise InvalidImages(
        f"the folders of {name} must be listable, got {len(faults)} that are not, the first {faults[0]}; "
        "mend or remove them, or set data.invalid_images=skip to go on without",
        faults,
    )


@rank_zero_only
def tell_skipped(images: Iterable[SkippedImage]) -> None:
    """One line on stderr."""
    images = tuple(images)
    print(
        f"warning: left out {len(images)} files or folders that cannot be read, the first {images[0]}",
        file=sys.stderr,
        flush=True,
    )


def _faults(name: str, split: FileImages, level: str) -> dict[int, str]:
    def look() -> dict[int, str]:
        return unreadable(split.paths, level, f"verifying {name} images", split.reading)

    return remembered(split.paths, f"{level} {split.reading}", look)


def _kept(count: int, at_fault: Mapping[int, str]) -> torch.Tensor:
    keep = torch.ones(count, dtype=torch.bool)
    keep[list(at_fault)] = False
    return keep.nonzero().flatten()


def _marked(split: FileImages, level: str) -> FileImages:
    """A copy that need not be verified so thoroughly again; its subsets neither."""
    marked = copy.copy(split)
    marked.verified = level
    return marked


def _refuse_too_many(name: str, split: ImageSplit, keep: torch.Tensor, first: SkippedImage) -> None:
    skipped = len(split) - len(keep)
    if skipped > MOST_SKIPPED * len(split):
        raise UserError(
            "data.invalid_images must be stop where more than half of the images cannot be read, got 'skip' "
            f"and {skipped} of {len(split)} {name} images that cannot, the first {first}; correct the path "
            "or fetch the images anew"
        )
    lost = sorted(set(split.labels.tolist()) - set(split.labels[keep].tolist()))
    if lost:
        label = split.classes[lost[0]] if split.classes else lost[0]
        raise UserError(
            f"data.invalid_images must leave every class an image, got 'skip' and {len(lost)} classes of the "
            f"{name} images without a readable one, the first {label!r}; replace its images or remove it"
        )
