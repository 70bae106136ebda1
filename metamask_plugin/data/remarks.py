"""What is said of a data set that can be used, and yet may not be what was meant: one line on stderr each."""

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from metamask_plugin.data.images import peak_of_16_bits
from metamask_plugin.data.splits import FileImages, ImageSplit
from metamask_plugin.signals import is_first_process

LOOKED_AT = 256
"""Files, evenly spaced, whose headers say whether there is 16-bit grey; of that alone pixels are read."""


def tell(line: str) -> None:
    """One line on stderr, of the first process."""
    if is_first_process():
        print(line, file=sys.stderr, flush=True)


def tell_shared(train: ImageSplit, test: ImageSplit | None) -> None:
    """How many test images are training images, too."""
    if not (isinstance(train, FileImages) and isinstance(test, FileImages)):
        return
    known, asked = _real_paths(train.paths), _real_paths(test.paths)
    shared = len(set(asked) & set(known))
    if shared:
        tell(
            f"warning: {shared} of {len(asked)} test images are training images: accuracies do not say how "
            "well other images are classified; set data.val_path to other images than data.train_path"
        )


def tell_unevaluated(node: Mapping[str, Any], train: ImageSplit, test: ImageSplit | None) -> None:
    """Why nothing is evaluated although test images are named."""
    if node.get("no_labels") and (node.get("val_path") or test is not None):
        unused = "data.val_path is not read" if test is None else "the test images are not used"
        tell(
            f"note: {unused} and nothing is evaluated, as data.no_labels=True leaves no labels to learn from"
        )


def tell_unused_statistics(
    name: str,
    mean: Sequence[float],
    std: Sequence[float],
    entries: Sequence[Mapping[str, Any]],
    data: Mapping[str, Any],
) -> None:
    """Which mean and std of a config are not what the images are normalised with.

    As in solo-learn, those of ``augmentations`` count for ``custom`` alone. There the first entry's go before
    ``data.mean`` and ``data.std``.
    """
    places = {"data": data, **{f"augmentations.{index}": entry for index, entry in enumerate(entries)}}
    unused = [
        f"{place}.{key}"
        for place, node in places.items()
        for key, used in (("mean", mean), ("std", std))
        if node.get(key) is not None and tuple(node[key]) != tuple(used)
    ]
    if unused:
        own = f"the mean and std of {name}" if data.get("mean") is None else "data.mean and data.std"
        used = "augmentations.0.mean and .std" if name == "custom" else own
        remedy = "leave them out" if name == "custom" else "set data.mean and data.std"
        tell(f"note: {', '.join(unused)} without effect: the images are normalised with {used}; {remedy}")


def tell_unused_bits(name: str, split: FileImages) -> None:
    """Whether 16-bit grey uses fewer bits than ``data.bits`` says and is read almost black, or more."""
    step = -(-len(split) // LOOKED_AT) or 1
    peaks = [peak for path in split.paths[::step] if (peak := peak_of_16_bits(path)) is not None]
    used = max(peaks, default=2**split.bits - 1).bit_length()
    found = f"warning: {name} images with 16-bit grey use {used} bits"
    if used > split.bits:
        tell(f"{found}, and values above {2**split.bits - 1} become white; set data.bits={used}")
    elif used < split.bits == 16:  # who sets data.bits knows how many there are
        # cameras and scanners have an even number of bits, and a sample may miss the brightest pixel
        fitting = used if used == 15 else max(8, used + used % 2)
        tell(f"{found} and are read too dark; set data.bits={fitting}")


def _real_paths(paths: Sequence[str]) -> list[str]:
    """Paths with the links of their folders resolved."""
    places = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return [os.path.join(places[os.path.dirname(path)], os.path.basename(path)) for path in paths]
