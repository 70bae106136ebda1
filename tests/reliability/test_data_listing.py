"""Folders that cannot be listed, classes without images, and what desktops put beside images."""

import json
import os
import random

import pytest
from image_faults import encoded, make_tree
from omegaconf import OmegaConf
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

from metamask_plugin.cli import verify as verify_folders
from metamask_plugin.data import FolderImages, PretrainDataModule, load_dataset, registry
from metamask_plugin.data.datasets.coco import CLASSES
from metamask_plugin.errors import UserError


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "train")


def load(tree, **options):
    return load_dataset({"dataset": "custom", "train_path": str(tree), **options})


def message(error, path):
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text


@pytest.mark.fault("data")
@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder, whatever its permissions")
@pytest.mark.parametrize("place", [".", "dog", "dog/small"])
def test_a_folder_without_permission(tree, place):
    make_tree(tree / "dog", ("small",))
    (tree / place).chmod(0)
    try:
        with pytest.raises(UserError, match="no permission to read it; run: chmod") as error:
            load(tree)
        message(error, tree / place if place != "." else tree)
    finally:
        (tree / place).chmod(0o755)


@pytest.mark.fault("data")
@pytest.mark.parametrize("labelled", [True, False])
def test_a_folder_that_cannot_be_listed_is_never_skipped(tree, labelled, monkeypatch):
    """The operating system refuses; root it would not refuse."""
    make_tree(tree / "dog", ("small",))
    scandir = os.scandir

    def scan(path="."):
        if os.fspath(path) == str(tree / "dog" / "small"):
            raise PermissionError(13, "denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", scan)
    with pytest.raises(UserError, match="no permission to read it; run: chmod") as error:
        load(tree, no_labels=not labelled, invalid_images="skip")
    message(error, tree / "dog" / "small")


@pytest.mark.fault("data")
def test_a_class_that_is_a_link_to_nothing_is_never_skipped(tree):
    """Without it the classes would be others."""
    (tree / "fox").symlink_to("/mnt/not mounted")
    with pytest.raises(UserError, match="a link to nothing") as error:
        load(tree, invalid_images="skip")
    message(error, tree / "fox")


@pytest.mark.fault("data")
def test_a_link_back_lists_nothing_twice(tree):
    sound = load(tree).fingerprint()
    (tree / "dog" / "again").symlink_to("..")
    assert load(tree).fingerprint() == sound


@pytest.mark.fault("data")
@pytest.mark.parametrize("on_invalid", ["stop", "skip"])
def test_a_class_without_images(tree, on_invalid):
    (tree / "fox").mkdir()
    (tree / "fox" / "notes.txt").write_text("to do")
    with pytest.raises(UserError, match="filled with images in each of its 3 class folders") as error:
        load(tree, invalid_images=on_invalid)
    message(error, tree / "fox")


HIDDEN = pytest.mark.fault(
    "data", source="pytorch/vision#2831, pytorch/vision#109, open-mmlab/mmpretrain#507"
)
SYSTEM = (".ipynb_checkpoints", "@eaDir", "Thumbnails", ".Trash-1000", "__MACOSX", "$RECYCLE.BIN")


def litter(folder):
    """A folder with an image, and deeper in it another."""
    (folder / "deeper").mkdir(parents=True)
    for place in (folder, folder / "deeper"):
        Image.new("RGB", (8, 8)).save(place / "0.jpg")


@HIDDEN
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("place", [".", "cat", "cat/small"])
def test_folders_of_the_system_are_left_out_at_any_depth(tree, labelled, place, capfd):
    sound = load(tree, no_labels=not labelled)
    (tree / place).mkdir(exist_ok=True)
    for name in SYSTEM:
        litter(tree / place / name)
    (tree / place / "._0.jpg").write_bytes(b"resource fork")
    dataset = load(tree, no_labels=not labelled)
    assert len(dataset.train) == 8 and dataset.train.classes == (["cat", "dog"] if labelled else [])
    assert dataset.fingerprint() == sound.fingerprint()
    assert verify_folders.main([str(tree)]) == 0
    assert capfd.readouterr().err == "0 of 8 images cannot be read\n"


@pytest.mark.fault("data")
def test_a_data_set_below_a_hidden_folder_is_read(tmp_path):
    assert len(load(make_tree(tmp_path / ".cache" / "@eaDir" / "train")).train) == 8


@pytest.mark.fault("data")
@pytest.mark.parametrize(("name", "form"), [("x.jfif", "JPEG"), ("x.JPE", "JPEG"), ("x.gif", "GIF")])
def test_other_extensions_are_read_where_pillow_can(tree, name, form):
    (tree / "cat" / name).write_bytes(encoded(form))
    dataset = load(tree)
    (index,) = (i for i, path in enumerate(dataset.train.paths) if path.endswith(name))
    assert len(dataset.train) == 9 and dataset.train.image(index).size == (64, 48)


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
    assert len(expected) > 150
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
    data["num_workers"] = 0
    cfg = {"data": data, "augmentations": [{"crop_size": 8}], "optimizer": {"batch_size": 2}}
    with pytest.raises(UserError, match="No such file") as error:
        PretrainDataModule(load_dataset(data), OmegaConf.create(cfg))
    message(error, missing)
    data["invalid_images"] = "skip"
    for pipeline in ("torchvision", "kornia"):
        cfg["data"]["pipeline"] = pipeline
        dataset = PretrainDataModule(load_dataset(data), OmegaConf.create(cfg)).dataset
        split = dataset.train if layout is coco else dataset.test
        assert len(split) == len(split.boxes) == 4
        assert dataset.skipped == ((str(missing), "No such file or directory"),)
