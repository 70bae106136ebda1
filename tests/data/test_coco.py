import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from metamask_plugin.data.datasets.coco import CLASSES, coco_splits
from metamask_plugin.data.registry import MEAN_STD, load_dataset
from metamask_plugin.errors import UserError

# COCO's own ids have gaps and do not follow the alphabet; "car" is not among the 30.
CATEGORIES = [{"id": 3, "name": "car"}] + [
    {"id": 200 - 2 * i, "name": name} for i, name in enumerate(CLASSES)
]
ID = {node["name"]: node["id"] for node in CATEGORIES}
# image: its annotations as (category, box, iscrowd)
SCENES = {
    "cat.jpg": [("cat", [3.5, 2.0, 10.2, 5.0], 0)],
    "two cats.jpg": [("cat", [0, 0, 5, 5], 0), ("cat", [9, 9, 5, 5], 0)],
    "cat and car.jpg": [("cat", [0, 0, 5, 5], 0), ("car", [9, 9, 5, 5], 0)],
    "car and cat.jpg": [("car", [9, 9, 5, 5], 0), ("cat", [0, 0, 5, 5], 0)],
    "crowd.jpg": [("person", [0, 0, 5, 5], 1)],
    "car.jpg": [("car", [0, 0, 5, 5], 0)],
    "empty.jpg": [],
    "zebra.jpg": [("zebra", [-1.0, 10.5, 99, 99], 0)],
    "airplane.jpg": [("airplane", [29.9, 19.9, 0.0, 0.0], 0)],
}


def annotations(scenes=SCENES) -> dict:
    images = [{"id": 10 * i, "file_name": name, "width": 30, "height": 20} for i, name in enumerate(scenes)]
    targets = [
        {"image_id": 10 * i, "category_id": ID[category], "bbox": box, "iscrowd": crowd}
        for i, scene in enumerate(scenes.values())
        for category, box, crowd in scene
    ]
    return {"images": images, "annotations": targets, "categories": CATEGORIES}


def write(folder: Path, content, images=SCENES) -> dict[str, str]:
    """Images and annotation file; how :func:`coco_splits` is told of them."""
    folder.mkdir()
    for i, name in enumerate(images):
        Image.new("RGB", (30, 20), (15 * i, 0, 0)).save(folder / name)
    file = folder.with_suffix(".json")
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return {"train_path": str(folder), "train_annotations": str(file)}


def test_thirty_classes():
    assert len(CLASSES) == 30 and list(CLASSES) == sorted(CLASSES)


def test_images_with_one_target_of_the_right_kind(tmp_path):
    train, test = coco_splits(**write(tmp_path / "train", annotations()))
    assert test is None
    assert [Path(path).name for path in train.paths] == ["cat.jpg", "zebra.jpg", "airplane.jpg"]
    assert [train.classes[label] for label in train.labels] == ["cat", "zebra", "airplane"]
    assert train.classes == list(CLASSES)
    assert train.boxes.dtype == torch.int32
    # rounded outwards, clipped, and never empty
    assert train.boxes.tolist() == [[3, 2, 14, 7], [0, 10, 30, 20], [29, 19, 30, 20]]
    assert abs(train.image(1).getpixel((0, 0))[0] - 15 * 7) < 5


def test_registered_and_decoded(tmp_path):
    one = write(tmp_path / "a", annotations())
    other = write(tmp_path / "b", annotations({"bus.jpg": [("bus", [1, 2, 3, 4], 0)]}), ["bus.jpg"])
    dataset = load_dataset(
        {
            "dataset": "coco",
            "train_path": one["train_path"],
            "val_path": other["train_path"],
            "kwargs": {
                "train_annotations": one["train_annotations"],
                "val_annotations": other["train_annotations"],
            },
        }
    )
    assert (dataset.mean, dataset.std) == MEAN_STD["coco"] == MEAN_STD["imagenet"]
    assert dataset.num_classes == 30 and len(dataset.train) == 3 and len(dataset.test) == 1
    # 30 x 20 to 15 x 10, then columns 2 to 12 (torchvision rounds 2.5 to 2)
    decoded = dataset.train.to_memory(10)
    assert decoded.boxes.tolist() == [[0, 1, 5, 4], [0, 5, 10, 10], [9, 9, 10, 10]]


def without(key: str, where: str | None = None) -> dict:
    content = annotations()
    for node in [content] if where is None else content[where]:
        del node[key]
    return content


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"{", "JSONDecodeError"),
        (b"[]", "TypeError"),
        (b"\xff\x00\xff", "UnicodeDecodeError|JSONDecodeError"),
        (without("annotations"), "KeyError: 'annotations'"),
        (without("categories"), "KeyError: 'categories'"),
        (without("bbox", "annotations"), "KeyError: 'bbox'"),
        (without("file_name", "images"), "KeyError: 'file_name'"),
        (annotations({"cat.jpg": [("cat", [1, 2, 3], 0)]}), "ValueError"),
        (annotations({"cat.jpg": [("cat", [1, float("nan"), 3, 4], 0)]}), "ValueError"),
        (annotations({"cat.jpg": [("cat", "here", 0)]}), "TypeError|ValueError"),
        (annotations({"car.jpg": SCENES["car.jpg"]}), "no image with one object"),
        ({**annotations(), "categories": CATEGORIES[:-2]}, "a file without 2 of the 30 categories"),
    ],
)
def test_unusable_annotation_files_are_one_line(tmp_path, content, found):
    paths = write(tmp_path / "train", content)
    with pytest.raises(UserError, match=rf"must be one of COCO's instances, got ({found})") as error:
        coco_splits(**paths)
    message = str(error.value)
    assert paths["train_annotations"] in message and "; take instances_" in message and "\n" not in message


def test_missing_files(tmp_path):
    paths = write(tmp_path / "train", annotations(), ["cat.jpg"])
    with pytest.raises(UserError, match="got FileNotFoundError"):
        coco_splits(paths["train_path"], train_annotations=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match="must be a readable folder, got no such folder"):
        coco_splits(str(tmp_path / "none"), train_annotations=paths["train_annotations"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_path": None}, r"data\.train_path must be a folder of images"),
        ({}, r"data\.kwargs\.train_annotations must be .*got None; take instances_"),
        ({"kwargs": {"train_annotations": "a", "val_annotations": "b"}}, r"must be given both or neither"),
        ({"kwargs": {"train_annotations": "a"}, "val_path": "b"}, r"must be given both or neither"),
        ({"kwargs": {"train_annotation": "a"}}, r"did you mean 'train_annotations'"),
    ],
)
def test_settings_are_checked(options, message):
    with pytest.raises(UserError, match=message) as error:
        load_dataset({"dataset": "coco", "train_path": "images", **options})
    assert "\n" not in str(error.value)
