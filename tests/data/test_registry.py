import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.data import FolderImages, registry
from metamask_plugin.data.regions import in_region
from metamask_plugin.data.registry import DATASETS, MEAN_STD, load_dataset
from metamask_plugin.errors import UserError


def write_folders(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(root / name / f"{i}.png")
    return str(root)


def test_names():
    names = "digits confounded_digits cifar10 cifar100 stl10 tiny_imagenet coco imagenet100 imagenet custom"
    assert set(DATASETS) == set(names.split())


@pytest.mark.parametrize("name", ["digits", "confounded_digits"])
def test_generated_sets_are_normalised_by_their_own_statistics(name):
    dataset = load_dataset(OmegaConf.create({"dataset": name, "kwargs": {"size": 16}}))
    assert dataset.name == name and dataset.num_classes == 10
    assert len(dataset.train) == 1297 and len(dataset.test) == 500
    pixels = dataset.train.images / 255
    normalised = (pixels - torch.tensor(dataset.mean).view(3, 1, 1)) / torch.tensor(dataset.std).view(3, 1, 1)
    assert torch.allclose(normalised.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(normalised.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_mean_and_std_can_be_given():
    node = {"dataset": "digits", "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    dataset = load_dataset(node)
    assert (dataset.mean, dataset.std) == MEAN_STD["imagenet"]
    with pytest.raises(UserError, match="data.mean and data.std must be given both or neither"):
        load_dataset({**node, "std": None})


def test_options_reach_the_builder():
    dataset = load_dataset(
        {"dataset": "confounded_digits", "kwargs": {"correlation": 1.0, "size": 16, "copies": 2}}
    )
    assert len(dataset.train) == 2594
    assert torch.equal(dataset.train.backgrounds, dataset.train.labels)


def test_fraction_is_stratified_and_leaves_the_test_split():
    whole, part = (load_dataset({"dataset": "digits", "fraction": f}) for f in (-1, 0.1))
    shares = torch.bincount(part.train.labels) / torch.bincount(whole.train.labels)
    assert (shares - 0.1).abs().max() < 0.01
    assert len(part.test) == 500 and part.mean == whole.mean


def test_no_labels():
    dataset = load_dataset({"dataset": "digits", "no_labels": True})
    assert (dataset.train.labels == -1).all() and dataset.num_classes == 10
    assert (dataset.test.labels >= 0).all()


def test_in_region_takes_both_splits_and_turns_the_rest_to_the_mean():
    dataset = load_dataset({"dataset": "confounded_digits", "kwargs": {"size": 16}})
    colour = torch.tensor([round(255 * channel) for channel in dataset.mean]).view(3, 1, 1)
    seen = in_region(dataset, "foreground")
    assert (seen.name, seen.mean, seen.num_classes) == (dataset.name, dataset.mean, 10)
    for full, part in ((dataset.train, seen.train), (dataset.test, seen.test)):
        x0, y0, x1, y1 = full.boxes[7].tolist()
        expected = colour.expand(3, 16, 16).to(torch.uint8).clone()
        expected[:, y0:y1, x0:x1] = full.images[7, :, y0:y1, x0:x1]
        assert torch.equal(part.images[7], expected)
    assert not torch.equal(in_region(dataset, "foreground", "zoom").test.images, seen.test.images)
    full = in_region(dataset, "full")
    assert full.train is dataset.train and full.test is dataset.test


def test_in_region_without_test_split_or_boxes(tmp_path):
    train = write_folders(tmp_path, cat=2)
    dataset = load_dataset({"dataset": "custom", "train_path": train, "region": "foreground"})
    assert dataset.train.image(0).size == (8, 8), "load_dataset leaves the region to others"
    assert in_region(dataset, "full").test is None
    with pytest.raises(UserError, match=r"data\.region must be full, .* got 'background'; take"):
        in_region(dataset, "background")
    dataset.train.boxes = torch.tensor([[0, 0, 4, 4]] * 2, dtype=torch.int32)
    assert in_region(dataset, "background").test is None


@pytest.mark.parametrize("name", ["imagenet", "imagenet100", "custom", "cifar10", "stl10"])
def test_image_folders(tmp_path, name, monkeypatch):
    monkeypatch.setitem(registry.CLASSES, name, 2)
    train, test = write_folders(tmp_path / "a", cat=2, dog=3), write_folders(tmp_path / "b", cat=1, dog=1)
    dataset = load_dataset({"dataset": name, "train_path": train, "val_path": test})
    assert isinstance(dataset.train, FolderImages) and len(dataset.train) == 5 and len(dataset.test) == 2
    assert dataset.num_classes == 2
    assert (dataset.mean, dataset.std) == MEAN_STD[name]
    assert load_dataset({"dataset": name, "train_path": train}).test is None


def test_custom_without_labels_needs_no_classes(tmp_path):
    (tmp_path / "a").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    dataset = load_dataset({"dataset": "custom", "train_path": str(tmp_path), "no_labels": True})
    assert dataset.train.labels.tolist() == [-1] and dataset.test is None and dataset.num_classes == 1


def test_classes_must_agree(tmp_path):
    train, test = write_folders(tmp_path / "a", cat=1, dog=1), write_folders(tmp_path / "b", cat=1, fox=1)
    with pytest.raises(UserError, match=r"data\.val_path must be .* 'dog' only in the training split"):
        load_dataset({"dataset": "custom", "train_path": train, "val_path": test})


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"dataset": "cifar01"}, r"data\.dataset must be one of cifar10, .* did you mean 'cifar10'"),
        ({}, r"data\.dataset must be one of"),
        ({"dataset": "digits", "kwargs": {"sise": 8}}, r"did you mean 'size'"),
        ({"dataset": "digits", "fraction": 2}, r"data\.fraction must be between 0 and 1"),
        ({"dataset": "custom"}, r"data\.train_path must be a folder of class folders, got None"),
        ({"dataset": "custom", "no_labels": True}, r"data\.train_path must be a folder of images, got None"),
        (
            {"dataset": "imagenet", "train_path": "/no/such"},
            r"image folder /no/such must be a readable folder",
        ),
    ],
)
def test_errors_are_one_line(node, message):
    with pytest.raises(UserError, match=message) as error:
        load_dataset(node)
    assert "\n" not in str(error.value)
