"""CIFAR-10, CIFAR-100 and STL-10, from torchvision's files or from folders of images."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchvision.datasets import CIFAR10, CIFAR100, STL10

from metamask_plugin.data.datasets.folders import (
    SET_PATH,
    folder_splits,
    holds_image,
    is_hidden,
    listing,
    refuse_folder_of_splits,
)
from metamask_plugin.data.splits import MemoryImages, Splits
from metamask_plugin.errors import UserError, check


def torchvision_splits(name: str, train_path: str | None, val_path: str | None, download: bool) -> Splits:
    """Training and test split of ``cifar10``, ``cifar100`` or ``stl10``, from the first that is there:

    1. torchvision's own files below ``train_path`` (``cifar-10-batches-py`` and the like). The test images
       come from ``val_path`` if the files lie there, else from ``train_path``: seven of solo-learn's CIFAR
       configurations name a ``val_path`` without them.
    2. class folders in ``train_path``: an image folder, with ``val_path`` the one for test (none, no test).
    3. with ``download``, torchvision's download into ``train_path``.

    For STL-10 the training split is the labelled images followed by the 100,000 unlabelled ones with label
    -1, as in solo-learn (2.9 GB in memory).

    Raises:
        UserError: none of the three, or the files are damaged.
    """
    check(bool(train_path), "data.train_path", f"a folder with {name}", train_path, SET_PATH)
    layout, load = _SETS[name]
    root = Path(train_path)
    if (root / layout).is_dir():
        test_root = Path(val_path) if val_path and (Path(val_path) / layout).is_dir() else root
        return _guarded(load, name, root, test_root, False)
    if root.is_dir():
        folders = [entry for entry in listing(root) if entry.is_dir() and not is_hidden(entry.name)]
        refuse_folder_of_splits(root, [folder.name for folder in folders])
        if any(holds_image(folder) for folder in folders):
            return folder_splits(train_path, val_path)
    if download:
        return _guarded(load, name, root, root, True)
    raise UserError(
        f"data.train_path must hold {name} as {layout} or as class folders, got {root} with neither; "
        "set data.download=True, or correct the path"
    )


def _guarded(
    load: Callable[..., Splits], name: str, train_root: Path, test_root: Path, download: bool
) -> Splits:
    """torchvision reports damaged files and failed downloads by several errors of several lines."""
    try:
        return load(train_root, test_root, download)
    except (RuntimeError, OSError, EOFError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} in {train_root} must be complete and readable, got {type(error).__name__}: {reason}; "
            "delete the folder and set data.download=True"
        ) from None


def _cifar(source: type[CIFAR10], train_root: Path, test_root: Path, download: bool) -> Splits:
    splits = []
    for root, train in ((train_root, True), (test_root, False)):
        files = source(root, train=train, download=download)
        images = torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous()
        splits.append(MemoryImages(images, files.targets, files.classes))
    return splits[0], splits[1]


def _cifar10(train_root: Path, test_root: Path, download: bool) -> Splits:
    return _cifar(CIFAR10, train_root, test_root, download)


def _cifar100(train_root: Path, test_root: Path, download: bool) -> Splits:
    return _cifar(CIFAR100, train_root, test_root, download)


def _stl10(train_root: Path, test_root: Path, download: bool) -> Splits:
    splits = []
    for root, part in ((train_root, "train+unlabeled"), (test_root, "test")):
        files = STL10(root, split=part, download=download)
        # The files store columns first; torchvision hands out a transposed view of them.
        images = torch.from_numpy(np.ascontiguousarray(files.data))
        splits.append(MemoryImages(images, files.labels.astype(np.int64), files.classes))
    return splits[0], splits[1]


# name: torchvision's folder, and what reads it
_SETS: dict[str, tuple[str, Callable[..., Splits]]] = {
    "cifar10": ("cifar-10-batches-py", _cifar10),
    "cifar100": ("cifar-100-python", _cifar100),
    "stl10": ("stl10_binary", _stl10),
}
