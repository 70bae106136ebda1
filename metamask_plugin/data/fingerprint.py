"""A short name for a set of images, by which a resumed run knows that it goes on with the same ones."""

import hashlib
import os

import numpy as np

from metamask_plugin.data.splits import FileImages, ImageSplit, MemoryImages

# Beyond this so many, evenly spaced, stand for all: STL-10's 3 GB would take seconds at every start.
IMAGES_DIGESTED = 20_000


def fingerprint(split: ImageSplit) -> str:
    """Hash of the number of images, the class names, the labels, the boxes, and which images they are.

    Image files are known by their paths below the folder that holds them all, wherever that lies: one that
    was replaced under its own name is not noticed. Images in memory are known by their pixels.

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
