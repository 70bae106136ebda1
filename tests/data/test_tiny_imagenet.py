import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from metamask_plugin.data import registry
from metamask_plugin.data.datasets.tiny_imagenet import tiny_imagenet_splits
from metamask_plugin.data.registry import MEAN_STD, load_dataset
from metamask_plugin.data.splits import MemoryImages
from metamask_plugin.errors import UserError

CLASSES = ("n01", "n02")
# as in the files: last pixels included
TRAIN_BOXES = {"n02": [(0, 10, 63, 58), (5, 6, 5, 6)], "n01": [(14, 2, 54, 49), (0, 0, 63, 64)]}
VAL_ROWS = [("val_0.JPEG", "n02", (1, 2, 3, 4)), ("val_1.JPEG", "n01", (0, 0, 63, 63))]


def tabbed(*fields) -> str:
    return "\t".join(map(str, fields)) + "\n"


def save_image(path: Path, colour: tuple[int, int, int]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """Two classes with two training images and one test image each."""
    monkeypatch.setitem(registry.CLASSES, "tiny_imagenet", len(CLASSES))
    for name, boxes in TRAIN_BOXES.items():
        for i in range(len(boxes)):
            save_image(tmp_path / "train" / name / "images" / f"{name}_{i}.JPEG", (100 * i, 0, 0))
        lines = [tabbed(f"{name}_{i}.JPEG", *box) for i, box in enumerate(boxes)]
        (tmp_path / "train" / name / f"{name}_boxes.txt").write_text("".join(lines))
    for image, name, _ in VAL_ROWS:
        save_image(tmp_path / "val" / "images" / image, (0, 200 if name == "n02" else 0, 0))
    lines = [tabbed(image, name, *box) for image, name, box in VAL_ROWS]
    (tmp_path / "val" / "val_annotations.txt").write_text("".join(lines))
    return tmp_path


def splits(root: Path):
    return tiny_imagenet_splits(str(root / "train"), str(root / "val"))


def into_class_folders(root: Path) -> None:
    for image, name, _ in VAL_ROWS:
        (root / "val" / name).mkdir()
        shutil.move(root / "val" / "images" / image, root / "val" / name / image)
    (root / "val" / "images").rmdir()


def test_standard_layout(root):
    train, test = splits(root)
    assert train.classes == test.classes == list(CLASSES)
    assert train.labels.tolist() == [0, 0, 1, 1] and test.labels.tolist() == [1, 0]
    # half open, and what lies beyond the image is cut off
    assert train.boxes.tolist() == [[14, 2, 55, 50], [0, 0, 64, 64], [0, 10, 64, 59], [5, 6, 6, 7]]
    assert test.boxes.tolist() == [[1, 2, 4, 5], [0, 0, 64, 64]]
    assert train.boxes.dtype == test.boxes.dtype == torch.int32
    assert test.image(0).getpixel((0, 0))[1] > 150 and test.image(1).getpixel((0, 0))[1] < 50
    assert tiny_imagenet_splits(str(root / "train"), None)[1] is None


def test_registered(root):
    node = {"dataset": "tiny_imagenet", "train_path": str(root / "train"), "val_path": str(root / "val")}
    dataset = load_dataset(node)
    assert (dataset.mean, dataset.std) == MEAN_STD["tiny_imagenet"] and dataset.num_classes == 2
    half = load_dataset({**node, "fraction": 0.5}).train
    assert len(half) == 2
    for path, box in zip(half.paths, half.boxes.tolist(), strict=True):
        assert box == dataset.train.boxes[dataset.train.paths.index(path)].tolist()
    decoded = half.to_memory(32)
    assert isinstance(decoded, MemoryImages) and decoded.boxes.max() <= 32


@pytest.mark.parametrize("with_file", [True, False])
def test_val_in_class_folders(root, with_file):
    into_class_folders(root)
    if not with_file:
        (root / "val" / "val_annotations.txt").unlink()
    _, test = splits(root)
    assert test.classes == list(CLASSES) and test.labels.tolist() == [0, 1]
    assert (test.boxes.tolist() if with_file else test.boxes) == (
        [[0, 0, 64, 64], [1, 2, 4, 5]] if with_file else None
    )


def test_train_without_box_files(root):
    for name in CLASSES:
        (root / "train" / name / f"{name}_boxes.txt").unlink()
    train, test = splits(root)
    assert train.boxes is None and test.boxes is not None


@pytest.mark.parametrize(
    "line",
    ["n01_1.JPEG\t1\t2\t3", "n01_1.JPEG\t1\t2\tx\t4", "n01_1.JPEG 1 2 3 4", "n01_1.JPEG\t9\t2\t3\t4"],
    ids=["few", "letters", "spaces", "reversed"],
)
def test_malformed_line_is_named(root, line):
    file = root / "train" / "n01" / "n01_boxes.txt"
    file.write_text(file.read_text().splitlines()[0] + "\n" + line + "\n")
    with pytest.raises(UserError, match=r"line 2, must be image, x0, y0, x1, y1 with tabs") as error:
        splits(root)
    assert str(file) in str(error.value) and "\n" not in str(error.value)


def damage(root: Path, how: str) -> None:
    file = root / "val" / "val_annotations.txt"
    if how == "no annotations":
        file.unlink()
    elif how == "empty annotations":
        file.write_text("\n")
    elif how == "not text":
        file.write_bytes(b"\xff\xfe\xff")
    elif how == "no class":
        file.write_text(tabbed("val_0.JPEG", 1, 2, 3, 4))
    elif how == "image without box":
        save_image(root / "train" / "n02" / "images" / "n02_7.JPEG", (0, 0, 0))
    elif how == "unknown class":
        file.write_text(file.read_text().replace("n02", "n03"))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no annotations", r"val_annotations\.txt must be there, .* set data\.val_path to the folder val"),
        ("empty annotations", r"val_annotations\.txt must be a line for each image, got 'none'"),
        ("not text", r"val_annotations\.txt must be readable, got UnicodeDecodeError"),
        ("no class", r"val_annotations\.txt, line 1, must be image, class, x0"),
        ("image without box", r"none for 1 of them, the first .*n02_7\.JPEG"),
        ("unknown class", r"data\.val_path must be .* 'n02' only in the training split"),
    ],
)
def test_errors_are_one_line(root, how, message):
    damage(root, how)
    node = {"dataset": "tiny_imagenet", "train_path": str(root / "train"), "val_path": str(root / "val")}
    with pytest.raises(UserError, match=message) as error:
        load_dataset(node)
    assert "\n" not in str(error.value)


def test_path_is_needed():
    with pytest.raises(UserError, match=r"data\.train_path must be a folder with tiny_imagenet, got None"):
        tiny_imagenet_splits(None, None)
