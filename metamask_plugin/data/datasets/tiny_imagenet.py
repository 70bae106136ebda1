"""Tiny ImageNet [0] with its foreground boxes, in the layout that it is distributed in.

[0] Y. Le, X. Yang, Tiny ImageNet visual recognition challenge, Stanford CS 231N, 2015
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from metamask_plugin.data.datasets.folders import (
    SET_PATH,
    FolderImages,
    holds_image,
    path_inside,
)
from metamask_plugin.data.images import Box, clip_box
from metamask_plugin.data.splits import FileImages, Splits
from metamask_plugin.errors import UserError, check

# Height and width of every image, pixels.
SIZE = 64
ANNOTATIONS = "val_annotations.txt"


def tiny_imagenet_splits(train_path: str | None, val_path: str | None) -> Splits:
    """Training and test split of ``tiny-imagenet-200/train`` and ``tiny-imagenet-200/val``.

    Training boxes come from ``<class>/<class>_boxes.txt``; without these files there are none. The test
    images lie in ``images`` and ``val_annotations.txt`` labels them; where they have been moved into class
    folders, the folders are their labels and the file, if it is still there, gives the boxes alone.

    Args:
        train_path: folder of class folders.
        val_path: folder of the test images; None, no test split.

    Raises:
        UserError: a folder or file is missing, a line is malformed, or an image has no box.
    """
    check(bool(train_path), "data.train_path", "a folder with tiny_imagenet", train_path, SET_PATH)
    return _train_split(Path(train_path)), _val_split(Path(val_path)) if val_path else None


def _train_split(root: Path) -> FolderImages:
    split = FolderImages(root)
    boxes = {}
    for name in split.classes:
        file = root / name / f"{name}_boxes.txt"
        if file.is_file():
            boxes.update(((name, image), box) for (image,), box in _read_rows(file, ("image",)))
    names = [split.classes[label] for label in split.labels.tolist()]
    return _with_boxes(split, [(name, Path(path).name) for name, path in zip(names, split.paths)], boxes)


def _val_split(root: Path) -> FileImages:
    file = root / ANNOTATIONS
    if (root / "images").is_dir() and holds_image(root / "images"):
        return _annotated_images(root / "images", file)
    split = FolderImages(root)
    boxes = {}
    if file.is_file():
        boxes = {image: box for (image, _), box in _read_rows(file, ("image", "class"))}
    return _with_boxes(split, [Path(path).name for path in split.paths], boxes)


def _annotated_images(folder: Path, file: Path) -> FileImages:
    check(
        file.is_file(),
        f"Tiny ImageNet's {file}",
        "there, as it holds the labels",
        "no such file",
        "set data.val_path to the folder val (the images in test have no labels)",
    )
    rows = list(_read_rows(file, ("image", "class")))
    check(bool(rows), f"Tiny ImageNet's {file}", "a line for each image", "none", "unpack it anew")
    paths = [path_inside(folder, image, file) for (image, _), _ in rows]
    classes = sorted({name for (_, name), _ in rows})
    label = {name: i for i, name in enumerate(classes)}
    boxes = torch.tensor([box for _, box in rows], dtype=torch.int32)
    return FileImages(paths, [label[name] for (_, name), _ in rows], classes, boxes)


def _with_boxes(split: FolderImages, keys: Sequence[Hashable], boxes: Mapping[Hashable, Box]) -> FolderImages:
    """``split`` with the box of each image's key; as it is, where there are no boxes at all."""
    if boxes:
        bare = [path for path, key in zip(split.paths, keys) if key not in boxes]
        check(
            not bare,
            "Tiny ImageNet's box files",
            f"there with a line for each of {len(split)} images",
            f"none for {len(bare)} of them, the first {bare[0] if bare else ''}",
            "unpack it anew, or remove the box files to go without",
        )
        split.boxes = torch.tensor([boxes[key] for key in keys], dtype=torch.int32)
    return split


def _read_rows(file: Path, columns: Sequence[str]) -> Iterator[tuple[list[str], Box]]:
    """The text columns and the half-open box of each line; the file's boxes include their last pixels."""
    try:
        lines = file.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"Tiny ImageNet's {file} must be readable, got {type(error).__name__}: {reason}; unpack it anew"
        ) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            x0, y0, x1, y1 = _read_box(file, number, line, columns)
            yield line.split("\t")[: len(columns)], clip_box((x0, y0, x1 + 1, y1 + 1), SIZE, SIZE)


def _read_box(file: Path, number: int, line: str, columns: Sequence[str]) -> Box:
    try:
        x0, y0, x1, y1 = (int(field) for field in line.split("\t")[len(columns) :])
    except ValueError:
        x0, y0, x1, y1 = 0, 0, -1, -1
    layout = ", ".join([*columns, "x0, y0, x1, y1"])
    check(
        x0 <= x1 and y0 <= y1,
        f"Tiny ImageNet's {file}, line {number},",
        f"{layout} with tabs between, x0 <= x1 and y0 <= y1",
        line,
        "unpack it anew",
    )
    return x0, y0, x1, y1
