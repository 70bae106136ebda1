"""What is said of a data set that can be used, and yet may not be what was meant: one line on stderr each."""

import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from metamask_plugin.data.image_file import Peak, peak_of_16_bits
from metamask_plugin.data.image_tree import Listing, images_by_content
from metamask_plugin.data.splits import FileImages, ImageSplit
from metamask_plugin.data.unreadable import printable

# Headers are cheap; of the files with 16 bits a few say what all of them are.
HEADERS, DECODED = 256, 16


@rank_zero_only
def tell(line: str) -> None:
    """One line on stderr, of the first process."""
    print(line, file=sys.stderr, flush=True)


def tell_left_out(splits: Sequence[ImageSplit | Listing]) -> None:
    """How many images are hidden, and how many files are images by their content alone."""
    hidden = [path for split in splits for path in split.hidden]
    if hidden:
        tell(
            f"note: left out {len(hidden)} images that are hidden or lie in folders of a desktop or a file "
            "server (names that begin with a dot, @eaDir, __MACOSX, thumbnails ...), the first "
            f"{printable(hidden[0])}"
        )
    unnamed, complete = images_by_content(path for split in splits for path in split.others)
    if unnamed:
        endings = Counter(os.path.splitext(path)[1] or "none" for path in unnamed)
        listed = ", ".join(f"{printable(ending)}: {count}" for ending, count in endings.most_common(5))
        least = "" if complete else "at least "
        tell(
            f"warning: left out {least}{len(unnamed)} files that begin like images and have another "
            f"extension ({listed}), the first {printable(unnamed[0])}; rename them to .jpg, .png ..."
        )


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
    places = {"data": data, **{f"augmentations[{index}]": entry for index, entry in enumerate(entries)}}
    unused = [
        f"{place}.{key}"
        for place, node in places.items()
        for key, used in (("mean", mean), ("std", std))
        if node.get(key) is not None and tuple(node[key]) != tuple(used)
    ]
    if unused:
        own = f"the mean and std of {name}" if data.get("mean") is None else "data.mean and data.std"
        used = "augmentations[0].mean and .std" if name == "custom" else own
        remedy = "leave them out" if name == "custom" else "set data.mean and data.std"
        tell(f"note: {', '.join(unused)} without effect: the images are normalised with {used}; {remedy}")


def tell_unused_bits(name: str, split: FileImages) -> None:
    """Whether images with 16 bits a channel use fewer, and would be read as almost black, or use more."""
    peaks = _peaks(split)
    for grey in (True, False):
        values = [peak.value for peak in peaks if peak.grey == grey]
        if values:
            _tell_bits(name, split.reading.bits if grey else 16, max(values), len(values), grey)


def _tell_bits(name: str, bits: int, largest: int, count: int, grey: bool) -> None:
    used = largest.bit_length()
    kind = "grey" if grey else "colour"
    found = f"{name} images with 16-bit {kind} use {used} bits (largest value {largest} of {count} looked at)"
    if used > bits:
        tell(f"warning: {found} and values above {2**bits - 1} become white; set data.bits={used}")
    elif used < bits == 16:  # who sets data.bits knows how many there are
        # cameras and scanners have an even number of bits, and a sample may miss the brightest pixel
        fitting = used if used == 15 else max(8, used + used % 2)
        remedy = f"set data.bits={fitting}" if grey else "save them with 8 bits a channel"
        tell(f"warning: {found} and are read too dark; {remedy}")


def _peaks(split: FileImages) -> list[Peak]:
    """Of some files, evenly spaced."""
    step = -(-len(split.paths) // HEADERS) or 1
    peaks: list[Peak] = []
    for path in split.paths[::step]:
        peak = peak_of_16_bits(path)
        if peak is not None:
            peaks.append(peak)
        if len(peaks) == DECODED:
            break
    return peaks


def _real_paths(paths: Sequence[str]) -> list[str]:
    """Paths with the links of their folders resolved."""
    places = {folder: os.path.realpath(folder) for folder in {os.path.dirname(path) for path in paths}}
    return [os.path.join(places[os.path.dirname(path)], os.path.basename(path)) for path in paths]
