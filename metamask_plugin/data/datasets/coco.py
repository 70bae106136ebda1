"""COCO's images with one annotated object, as ICL-MSR takes them for its foreground and background study."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from metamask_plugin.data.datasets.folders import listing, path_inside
from metamask_plugin.data.images import Box, clip_box
from metamask_plugin.data.splits import FileImages, Splits
from metamask_plugin.errors import UserError, check

# The 30 classes of Qiang et al., ICML 2022, Section 6.2, in the order of the labels.
CLASSES = (
    "airplane, banana, bear, bed, bench, bird, boat, broccoli, bus, cat, clock, cow, dog, elephant, fire "
    "hydrant, giraffe, horse, motorcycle, person, pizza, scissors, sink, stop sign, teddy bear, toilet, "
    "traffic light, train, truck, vase, zebra"
).split(", ")
REMEDY = "take instances_train2017.json or instances_val2017.json of COCO"


def coco_splits(
    train_path: str | None,
    val_path: str | None = None,
    train_annotations: str | None = None,
    val_annotations: str | None = None,
) -> Splits:
    """Training and test split: the images with exactly one annotation, of one of :data:`CLASSES`.

    An image with several annotations, of whatever category, is left out, and so is one whose annotation is
    a crowd. The boxes are the annotations'.

    Args:
        train_path: folder of the training images (train2017).
        val_path: folder of the test images (val2017); None, no test split.
        train_annotations: their ``instances_*.json``.
        val_annotations: likewise for test.

    Raises:
        UserError: a folder or annotation file is missing or not as it should be.
    """
    check(bool(train_path), "data.train_path", "a folder of images (train2017)", train_path)
    check(
        bool(train_annotations),
        "data.kwargs.train_annotations",
        "the file of the training images' boxes",
        train_annotations,
        REMEDY,
    )
    check(
        bool(val_path) == bool(val_annotations),
        "data.val_path and data.kwargs.val_annotations",
        "given both or neither",
        (val_path, val_annotations),
    )
    train = _read_split(Path(train_path), Path(train_annotations))
    return train, _read_split(Path(val_path), Path(val_annotations)) if val_path else None


def _read_split(folder: Path, file: Path) -> FileImages:
    listing(folder)
    content = _read_json(file)
    try:
        label_of = _labels_by_category(content)
        rows = list(_single_targets(content, label_of))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise _unusable(file, f"{type(error).__name__}: {error}") from None
    absent = len(CLASSES) - len(set(label_of.values()))
    if absent:
        raise _unusable(file, f"a file without {absent} of the {len(CLASSES)} categories")
    if not rows:
        raise _unusable(file, "no image with one object of the right category")
    names, labels, boxes = zip(*rows)
    paths = [path_inside(folder, name, file) for name in names]
    return FileImages(paths, labels, CLASSES, torch.tensor(boxes, dtype=torch.int32))


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise _unusable(file, f"{type(error).__name__}: {error}") from None


def _labels_by_category(content: Mapping[str, Any]) -> dict[int, int]:
    """COCO's category ids have gaps and an order of their own: the names decide."""
    label = {name: i for i, name in enumerate(CLASSES)}
    return {node["id"]: label[node["name"]] for node in content["categories"] if node["name"] in label}


def _single_targets(
    content: Mapping[str, Any], label_of: Mapping[int, int]
) -> Iterator[tuple[str, int, Box]]:
    """File name, label and box of each image that is kept, in the order of the file."""
    targets = Counter(node["image_id"] for node in content["annotations"])
    annotation_of = {node["image_id"]: node for node in content["annotations"]}
    for image in content["images"]:
        if targets[image["id"]] != 1:
            continue
        annotation = annotation_of[image["id"]]
        label = label_of.get(annotation["category_id"])
        if label is not None and not annotation.get("iscrowd"):
            x, y, width, height = annotation["bbox"]
            box = clip_box((x, y, x + width, y + height), image["width"], image["height"])
            yield image["file_name"], label, box


def _unusable(file: Path, found: str) -> UserError:
    return UserError(
        f"annotation file {file} must be one of COCO's instances, got {' '.join(found.split())}; {REMEDY}"
    )
