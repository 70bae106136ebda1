"""Folders that cannot be listed, links that lead nowhere or round in circles, classes without images."""

import json
import os
import random

import pytest
from image_faults import make_tree
from omegaconf import OmegaConf
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from metamask_plugin.data import FolderImages, PretrainDataModule, load_dataset, registry
from metamask_plugin.data.coco import CLASSES
from metamask_plugin.data.unreadable import InvalidImages
from metamask_plugin.errors import UserError


@pytest.fixture
def tree(tmp_path):
    """Two classes of four images, and in ``dog`` a folder of four more."""
    tree = make_tree(tmp_path / "train")
    make_tree(tree / "dog", ("small",))
    return tree


def load(tree, **options):
    return load_dataset({"dataset": "custom", "train_path": str(tree), **options})


def message(error, path):
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text


def loop_to_parent(tree):
    (tree / "dog" / "again").symlink_to("..")
    return tree / "dog" / "again"


def loop_to_itself(tree):
    (tree / "dog" / "again").symlink_to(tree / "dog")
    return tree / "dog" / "again"


def loop_of_two(tree):
    (tree / "cat" / "dogs").symlink_to(tree / "dog")
    (tree / "dog" / "cats").symlink_to(tree / "cat")
    return tree / "cat" / "dogs" / "cats"


def loop_from_far_above(tree):
    (tree / "dog" / "again").symlink_to("/")
    return tree / "dog" / "again"


def link_to_no_folder(tree):
    (tree / "dog" / "more").symlink_to("/mnt/not mounted")
    return tree / "dog" / "more"


def link_round_in_a_circle(tree):
    (tree / "dog" / "a").symlink_to("b")
    (tree / "dog" / "b").symlink_to("a")
    return tree / "dog" / "a"


BENDS = {
    bend.__name__: bend
    for bend in (
        loop_to_parent,
        loop_to_itself,
        loop_of_two,
        loop_from_far_above,
        link_to_no_folder,
        link_round_in_a_circle,
    )
}


@pytest.mark.fault("data")
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("bend", BENDS)
def test_a_link_that_leads_nowhere_or_back(tree, bend, labelled, capfd):
    at_fault = BENDS[bend](tree)
    with pytest.raises(InvalidImages, match="invalid_images=skip") as error:
        load(tree, no_labels=not labelled)
    assert "a symbolic link to" in message(error, at_fault)
    dataset = load(tree, no_labels=not labelled, invalid_images="skip")
    names = [os.path.realpath(path) for path in dataset.train.paths]
    if bend != "loop_of_two":  # links beside each other list what they lead to, but once
        assert len(names) == len(set(names)) == 12
    assert max(names.count(name) for name in names) <= 3
    assert str(at_fault) in [fault.path for fault in dataset.skipped]
    assert len(capfd.readouterr().err.splitlines()) == 1


def deny(monkeypatch, folder, error=PermissionError):
    """The operating system refuses to list one folder; root it would not refuse."""
    scandir = os.scandir

    def scan(path="."):
        if os.fspath(path) == str(folder):
            raise error(13, "denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)


@pytest.mark.fault("data")
@pytest.mark.parametrize("error_class", [PermissionError, OSError])
@pytest.mark.parametrize("labelled", [True, False])
def test_a_nested_folder_that_cannot_be_listed(tree, labelled, error_class, monkeypatch):
    deny(monkeypatch, tree / "dog" / "small", error_class)
    with pytest.raises(InvalidImages, match="a folder that cannot be listed") as error:
        load(tree, no_labels=not labelled)
    message(error, tree / "dog" / "small")
    dataset = load(tree, no_labels=not labelled, invalid_images="skip")
    assert len(dataset.train) == 8 and [fault.path for fault in dataset.skipped] == [
        str(tree / "dog" / "small")
    ]
    cfg = {"data": {"num_workers": 0, "invalid_images": "skip"}, "augmentations": [{"crop_size": 8}]}
    data = PretrainDataModule(dataset, OmegaConf.create({**cfg, "optimizer": {"batch_size": 2}}))
    assert data.dataset.skipped == dataset.skipped


@pytest.mark.fault("data")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder, whatever its permissions")
def test_a_nested_folder_without_permission(tree):
    (tree / "dog" / "small").chmod(0)
    try:
        with pytest.raises(InvalidImages, match="no permission to read it") as error:
            load(tree)
        message(error, tree / "dog" / "small")
    finally:
        (tree / "dog" / "small").chmod(0o755)


@pytest.mark.fault("data")
@pytest.mark.parametrize("place", [".", "dog"])
def test_a_class_folder_that_cannot_be_listed_is_never_skipped(tree, place, monkeypatch):
    deny(monkeypatch, tree / place if place != "." else tree)
    with pytest.raises(UserError, match="no permission to read it; run: chmod") as error:
        load(tree, invalid_images="skip")
    message(error, tree / place if place != "." else tree)


@pytest.mark.fault("data")
@pytest.mark.parametrize("target", [".", "/mnt/not mounted"])
def test_a_class_that_is_a_link_to_nothing_is_never_skipped(tree, target):
    """Without it the classes would be others."""
    (tree / "fox").symlink_to(target)
    with pytest.raises(UserError, match="a symbolic link to") as error:
        load(tree, invalid_images="skip")
    message(error, tree / "fox")


@pytest.mark.fault("data")
@pytest.mark.parametrize("on_invalid", ["stop", "skip"])
def test_a_class_without_images(tree, on_invalid):
    (tree / "fox").mkdir()
    (tree / "fox" / "notes.txt").write_text("to do")
    with pytest.raises(UserError, match="filled with images in each of its 3 class folders") as error:
        load(tree, invalid_images=on_invalid)
    message(error, tree / "fox")


def test_images_and_order_are_torchvisions(tmp_path):
    generator = random.Random(0)
    for _ in range(200):
        parts = [
            generator.choice(("a", "a-b", "B", "\u00fc", "1", "a.b")) for _ in range(generator.randint(1, 4))
        ]
        folder = tmp_path.joinpath("tree", *parts)
        folder.mkdir(parents=True, exist_ok=True)
        ending = generator.choice((*IMG_EXTENSIONS, ".JPG", ".txt", ""))
        (folder / f"{generator.randrange(99)}{ending}").touch()
    root = tmp_path / "tree"
    (root / "a" / "linked").symlink_to(root / "1")
    (root / "a" / "1.jpg").touch()
    (root / "B" / "linked.png").symlink_to(root / "a" / "1.jpg")
    (root / "B" / "a folder.jpg").mkdir()
    (root / "B" / "a folder.jpg" / "inside.png").touch()
    classes = {name: i for i, name in enumerate(sorted(os.listdir(root)))}
    expected = make_dataset(str(root), classes, IMG_EXTENSIONS, allow_empty=True)
    for name in classes:
        (root / name / "~.jpg").touch()  # no class is empty
    expected = make_dataset(str(root), classes, IMG_EXTENSIONS)
    split = FolderImages(root)
    assert len(expected) > 150 and split.faults == ()
    assert list(zip(split.paths, split.labels.tolist())) == expected


@pytest.mark.fault("data")
def test_the_fingerprint_is_of_the_images_not_of_their_place(tmp_path):
    here, there = (make_tree(tmp_path / name) for name in ("here", "there/deep"))
    fingerprint = load(here).fingerprint()
    assert len(fingerprint) == 16 and load(there).fingerprint() == fingerprint
    assert load(here, fraction=0.5).fingerprint() != fingerprint
    assert load(here, fraction=0.5).fingerprint() == load(there, fraction=0.5).fingerprint()
    assert load(here, no_labels=True).fingerprint() != fingerprint
    (there / "cat" / "0.jpg").rename(there / "cat" / "9.jpg")
    assert load(there).fingerprint() != fingerprint
    (there / "cat" / "9.jpg").rename(there / "cat" / "0.jpg")
    assert load(there).fingerprint() == fingerprint
    (there / "dog" / "0.jpg").rename(there / "cat" / "00.jpg")
    assert load(there).fingerprint() != fingerprint
    (here / "dog").rename(here / "fox")
    assert load(here).fingerprint() != fingerprint


@pytest.mark.fault("data")
def test_the_fingerprint_of_images_in_memory_is_of_their_pixels():
    options = {"dataset": "confounded_digits", "kwargs": {"size": 16, "copies": 1}}
    one, same = (load_dataset(options) for _ in range(2))
    assert one.fingerprint() == same.fingerprint()
    assert load_dataset({**options, "fraction": 0.5}).fingerprint() != one.fingerprint()
    same.train.images[7, 0, 3, 3] += 1
    assert one.fingerprint() != same.fingerprint()


def coco(tmp_path):
    """Four images of two classes, of which the file names five."""
    folder = make_tree(tmp_path, ("coco",)) / "coco"
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASSES)]
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 20, "height": 16} for i in range(5)]
    boxes = [{"image_id": i, "category_id": i % 2, "bbox": [1, 1, 5, 5], "iscrowd": 0} for i in range(5)]
    file = tmp_path / "coco.json"
    file.write_text(json.dumps({"categories": categories, "images": images, "annotations": boxes}))
    return folder / "4.jpg", {
        "dataset": "coco",
        "train_path": str(folder),
        "kwargs": {"train_annotations": str(file)},
    }


def tiny_imagenet(tmp_path):
    """Four test images, of which the file names five."""
    make_tree(tmp_path / "train", ("n01", "n02"))
    folder = make_tree(tmp_path / "val", ("images",)) / "images"
    lines = [f"{i}.jpg\tn0{1 + i % 2}\t1\t1\t5\t5" for i in range(5)]
    (tmp_path / "val" / "val_annotations.txt").write_text("\n".join(lines))
    paths = {"train_path": str(tmp_path / "train"), "val_path": str(tmp_path / "val")}
    return folder / "4.jpg", {"dataset": "tiny_imagenet", **paths}


@pytest.mark.fault("data")
@pytest.mark.parametrize("layout", [coco, tiny_imagenet])
def test_an_annotated_image_that_is_missing(tmp_path, layout, monkeypatch):
    monkeypatch.setitem(registry.CLASSES, "tiny_imagenet", 2)
    missing, data = layout(tmp_path)
    with pytest.raises(UserError, match="1 missing, the first") as error:
        load_dataset(data)
    message(error, missing)
    data = {**data, "invalid_images": "skip", "num_workers": 0}
    cfg = {"data": data, "augmentations": [{"crop_size": 8}], "optimizer": {"batch_size": 2}}
    for pipeline in ("torchvision", "kornia"):
        cfg["data"]["pipeline"] = pipeline
        dataset = PretrainDataModule(load_dataset(data), OmegaConf.create(cfg)).dataset
        split = dataset.train if layout is coco else dataset.test
        assert len(split) == len(split.boxes) == 4
        assert dataset.skipped == ((str(missing), "no such file"),)
