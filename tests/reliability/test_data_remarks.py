"""Settings and files that can be used, and yet are hardly what was meant: said in one line, or refused."""

import json
import shutil

import pytest
import torch
from image_faults import make_tree
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.data import PretrainDataModule, load_dataset
from metamask_plugin.data.datasets.coco import CLASSES as COCO_CLASSES
from metamask_plugin.data.registry import CLASSES
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.knn import knn_table, within_bank

pytestmark = pytest.mark.fault("data")


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "train")


def said(capfd):
    return capfd.readouterr().err.splitlines()


def load(tree, **options):
    return load_dataset({"dataset": "custom", "train_path": str(tree), **options})


def module(augmentations, **data):
    cfg = {"data": {"num_workers": 0, **data}, "augmentations": augmentations}
    cfg = OmegaConf.create({**cfg, "optimizer": {"batch_size": 2}})
    return PretrainDataModule(load_dataset(cfg.data), cfg)


@pytest.mark.parametrize("how", ["same", "slash", "link", "some"])
def test_test_images_that_are_training_images_are_counted(tree, tmp_path, how, capfd):
    val = {"same": tree, "slash": f"{tree}/.", "link": tmp_path / "val", "some": tmp_path / "val"}[how]
    if how == "link":
        (tmp_path / "val").symlink_to(tree)
    if how == "some":
        make_tree(tmp_path / "val", ("dog",))
        (tmp_path / "val" / "cat").symlink_to(tree / "cat")
    load(tree, val_path=str(val))
    (warning,) = said(capfd)
    count = 4 if how == "some" else 8
    assert warning.startswith(f"warning: {count} of 8 test images are training images")


def test_equal_images_in_another_folder_are_no_news(tree, tmp_path, capfd):
    shutil.copytree(tree, tmp_path / "val")
    load(tree, val_path=str(tmp_path / "val"))
    assert said(capfd) == []


def test_mean_and_std_without_effect_are_said(tree, capfd):
    entry = {"crop_size": 16, "mean": [0.1, 0.2, 0.3], "std": [1.0, 1.0, 1.0]}
    digits = {"dataset": "digits", "kwargs": {"size": 16}}
    module([entry], **digits)
    (note,) = said(capfd)
    assert note.startswith("note: augmentations.0.mean, augmentations.0.std without effect")
    assert note.endswith("normalised with the mean and std of digits; set data.mean and data.std")
    found = module([entry], **digits, mean=[0.1, 0.2, 0.3], std=[1.0, 1.0, 1.0])
    assert found.dataset.mean == (0.1, 0.2, 0.3) and said(capfd) == []
    module([entry, {**entry, "mean": [0.5] * 3}], dataset="custom", train_path=str(tree))
    assert said(capfd)[0].startswith("note: augmentations.1.mean without effect")
    module([entry], dataset="custom", train_path=str(tree), mean=[0.5] * 3, std=[1.0] * 3)
    assert said(capfd)[0].startswith("note: data.mean without effect: the images are normalised with augm")
    module([{"crop_size": 16}], **digits)
    module([entry], dataset="custom", train_path=str(tree))
    assert said(capfd) == []


def test_test_images_that_are_not_used_are_said(tree, capfd):
    load(tree, no_labels=True, val_path="/nowhere")
    assert said(capfd)[0].startswith("note: data.val_path is not read and nothing is evaluated")
    load_dataset({"dataset": "digits", "no_labels": True})
    assert said(capfd)[0].startswith("note: the test images are not used and nothing is evaluated")
    load(tree, no_labels=True)
    assert said(capfd) == []


def bank(count):
    generator = torch.Generator().manual_seed(count)
    return Features(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


def test_a_column_says_how_many_neighbours_voted(capfd):
    train, test = bank(60), bank(9)
    table = knn_table(train, test, torch.rand(4), ks=(5, 20, 200, 5000))
    assert list(table) == ["knn5", "knn20", "knn60", "knn5_masked", "knn20_masked", "knn60_masked"]
    assert table["knn60"] == knn_table(train, test, ks=(60,))["knn60"]
    assert said(capfd) == []
    assert within_bank("evaluation.knn.k", [5, 20, 200, 5000], 60) == [5, 20, 60]
    (warning,) = said(capfd)
    assert warning.startswith("warning: evaluation.knn.k=200,5000 is more than the 60 training images")
    assert within_bank("--k", [5, 60], 60) == [5, 60] and said(capfd) == []


@pytest.mark.parametrize("name", CLASSES)
def test_a_folder_with_other_classes_is_another_data_set(tree, name):
    with pytest.raises(UserError, match=f"{CLASSES[name]} class folders for data.dataset={name}, got 2"):
        load(tree, dataset=name)


def test_as_many_class_folders_as_the_data_set_has_are_read(tmp_path):
    for i in range(10):
        (tmp_path / str(i)).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / str(i) / "0.png")
    assert load(tmp_path, dataset="cifar10").num_classes == 10


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "a/../../secret.jpg", 5, None, "", ".", "a\0b", ["a"]]
)
def test_an_annotation_names_images_below_its_folder_alone(tree, tmp_path, name):
    (tmp_path / "secret.jpg").touch()
    content = {
        "categories": [{"id": i, "name": label} for i, label in enumerate(COCO_CLASSES)],
        "images": [{"id": 0, "file_name": name, "width": 20, "height": 16}],
        "annotations": [{"image_id": 0, "category_id": 0, "bbox": [1, 1, 5, 5], "iscrowd": 0}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(content))
    options = {"kwargs": {"train_annotations": str(tmp_path / "coco.json")}, "invalid_images": "skip"}
    with pytest.raises(UserError, match="must be a path below the image folder") as error:
        load(tree, dataset="coco", **options)
    assert "\n" not in str(error.value) and "coco.json" in str(error.value)


def test_tiny_imagenets_annotations_likewise(tree, tmp_path):
    make_tree(tmp_path / "val", ("images",))
    (tmp_path / "val" / "val_annotations.txt").write_text("../../train/cat/0.jpg\tcat\t1\t1\t5\t5\n")
    with pytest.raises(UserError, match="must be a path below the image folder, got '../../train"):
        load(tree, dataset="tiny_imagenet", val_path=str(tmp_path / "val"))


@pytest.mark.parametrize(
    "content", ["[" * 100_000, "[]", "{}", '{"categories": 5, "images": [], "annotations": []}', "\udce4"]
)
def test_annotations_of_another_form_are_one_line(tree, tmp_path, content):
    (tmp_path / "coco.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match="must be one of COCO's instances") as error:
        load(tree, dataset="coco", kwargs={"train_annotations": str(tmp_path / "coco.json")})
    assert "\n" not in str(error.value)
