"""What an evaluation reads: the merged data node, and only labelled images."""

import pytest
import torch
from PIL import Image

from metamask_plugin.data import FolderImages, MemoryImages
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.registry import Dataset
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import labelled_images
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data

TRAINED = {
    "data": {
        "dataset": "confounded_digits",
        "kwargs": {"correlation": 0.3, "copies": 2},
        "num_workers": 3,
        "train_path": "a",
        "no_labels": True,
    }
}


def test_options_of_the_training_data_are_kept_for_the_same_data_set_only():
    same = merged_data(TRAINED, {"dataset": None, "train_path": "b"})
    assert same["kwargs"] == {"correlation": 0.3, "copies": 2}
    assert merged_data(TRAINED, {"kwargs": {"copies": 1}})["kwargs"] == {"correlation": 0.3, "copies": 1}
    assert (same["dataset"], same["train_path"], same["num_workers"]) == ("confounded_digits", "b", 3)
    other = merged_data(TRAINED, {"dataset": "digits", "num_workers": 0})
    assert other == {"dataset": "digits", "num_workers": 0}
    assert "no_labels" not in same


def test_it_normalises_as_the_training_did():
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.4, 0.3])
    trained = {"data": {"dataset": "digits", "mean": mean.tolist(), "std": std.tolist()}}
    data = LabelledImages.read(merged_data(trained, {}), 32)
    x, _ = next(iter(data.evaluation_loader("test")))
    pixels = data.images("test").images[: len(x)] / 255
    torch.testing.assert_close(x, (pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1))
    assert "mean" not in merged_data(trained, {"dataset": "confounded_digits"})


def test_no_data_set_and_a_format_that_is_not_read_are_named():
    with pytest.raises(UserError, match="data.dataset must be given"):
        merged_data({}, {})
    with pytest.raises(UserError, match="data.format must be image_folder or dali .* got 'h5'"):
        merged_data(TRAINED, {"format": "h5"})
    assert merged_data(TRAINED, {"format": "dali"})["dataset"] == "confounded_digits"


def test_an_evaluation_reads_full_images_whatever_the_encoder_saw():
    seen = {"data": {**TRAINED["data"], "region": "foreground", "region_form": "zoom"}}
    assert merged_data(seen, {}) == merged_data(TRAINED, {})
    assert merged_data(seen, {"region": "full"}) == merged_data(TRAINED, {})
    with pytest.raises(UserError, match="data.region must be full .* got 'background'; main_foreground.py"):
        merged_data(TRAINED, {"region": "background"})
    node = {"dataset": "confounded_digits", "kwargs": {"size": 16}}
    full, seen = (
        LabelledImages.read({**node, **more}, 16)
        for more in ({}, {"region": "foreground", "region_form": "zoom"})
    )
    for (x, _), (y, _) in zip(full.evaluation_loader("test"), seen.evaluation_loader("test")):
        assert torch.equal(x, y)


def images(labels):
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    return MemoryImages(pixels.clone(), torch.tensor(labels), ["a", "b"])


def fake(monkeypatch, train, test):
    dataset = Dataset(
        "digits", images(train), None if test is None else images(test), 2, (0.0,) * 3, (1.0,) * 3
    )
    monkeypatch.setattr(labelled_images, "load_dataset", lambda data: dataset)
    return LabelledImages.read({"dataset": "digits"}, 32, batch_size=2)


def test_unlabelled_images_are_left_out_and_the_order_is_kept(monkeypatch):
    data = fake(monkeypatch, [0, -1, 1, -1, 0], [1, 0])
    assert data.sizes == {"train": 3, "test": 2}
    batches = list(data.evaluation_loader("train"))
    assert torch.cat([y for _, y in batches]).tolist() == [0, 1, 0]
    assert [len(y) for _, y in batches] == [2, 1]
    values = torch.cat([x for x, _ in batches])[:, 0, 0, 0] * 255
    assert values.round().tolist() == [0, 2, 4]


def test_no_labels_and_no_test_split_are_named(monkeypatch):
    with pytest.raises(UserError, match="train images of digits must be labelled"):
        fake(monkeypatch, [-1, -1], [0])
    with pytest.raises(UserError, match="one with a test split.*val_data_path"):
        fake(monkeypatch, [0, 1], None)


def test_folders_of_images_are_read_with_the_given_mean(tmp_path):
    for split in ("train", "val"):
        for label, value in (("cat", 0), ("dog", 255)):
            (tmp_path / split / label).mkdir(parents=True)
            Image.new("RGB", (40, 30), (value,) * 3).save(tmp_path / split / label / "1.png")
    node = {
        "dataset": "custom",
        "train_path": tmp_path / "train",
        "val_path": tmp_path / "val",
        "num_workers": 0,
    }
    node = {key: str(value) if key.endswith("path") else value for key, value in node.items()}
    data = LabelledImages.read(node, 16, mean=[0.5] * 3, std=[0.5] * 3)
    ((x, y),) = data.evaluation_loader("test")
    assert x.shape == (2, 3, 16, 16)
    assert x[:, 0, 0, 0].tolist() == [-1, 1]
    assert y.tolist() == [0, 1]
    assert data.num_classes == 2


@pytest.mark.parametrize("form", ["fill", "zoom"])
@pytest.mark.parametrize("region", ["foreground", "background"])
def test_regions_are_those_of_the_labelled_images_with_the_mean_as_0(monkeypatch, region, form):
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 30, 20], [8, 0, 24, 32]], dtype=torch.int32)
    noise = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    split = MemoryImages(noise, [0, -1, 1], ["a", "b"], boxes)
    mean, std = (0.2, 0.4, 0.6), (0.5, 0.25, 0.125)
    dataset = Dataset("confounded_digits", split, split, 2, mean, std)
    monkeypatch.setattr(labelled_images, "load_dataset", lambda data: dataset)
    data = LabelledImages.read({"dataset": "confounded_digits"}, 32)
    ((x, y),) = data.evaluation_loader("train", region=region, form=form)
    expected = region_of(split.subset([0, 2]), region, mean, form).images.float() / 255
    expected = (expected - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    torch.testing.assert_close(x, expected)
    assert y.tolist() == [0, 1]
    corner = x[0, :, :8, :8] if region == "background" else x[1, :, :, :8]
    # 0.2, 0.4 and 0.6 are whole numbers of 1/255
    assert corner.abs().max() < 1e-6


def test_files_that_the_module_decodes_into_memory_keep_their_boxes(monkeypatch, tmp_path):
    for label, value in (("cat", 0), ("dog", 200)):
        (tmp_path / label).mkdir()
        Image.new("RGB", (32, 32), (value,) * 3).save(tmp_path / label / "1.png")
    split = FolderImages(tmp_path)
    split.boxes = torch.tensor([[0, 0, 16, 32], [16, 0, 32, 32]], dtype=torch.int32)
    dataset = Dataset("tiny_imagenet", split, split, 2, (1.0,) * 3, (1.0,) * 3)
    monkeypatch.setattr(labelled_images, "load_dataset", lambda data: dataset)
    for pipeline in ("kornia", "torchvision"):
        data = LabelledImages.read({"dataset": "tiny_imagenet", "pipeline": pipeline, "num_workers": 0}, 32)
        ((x, _),) = data.evaluation_loader("test", region="foreground")
        assert x[0, 0, 0, 0] == -1 and x[0, 0, 0, 31] == 0
        assert x[1, 0, 0, 0] == 0 and x[1, 0, 0, 31] == pytest.approx(200 / 255 - 1)
        ((x, _),) = data.evaluation_loader("test")
        assert (x[0] == -1).all(), "the full image"


def test_images_without_boxes_have_no_regions(monkeypatch):
    data = fake(monkeypatch, [0, 1], [1, 0])
    message = "data set digits must be one with foreground boxes, got 'none for its train and test images'"
    with pytest.raises(UserError, match=message):
        data.evaluation_loader("test", region="foreground")
    with pytest.raises(UserError, match="take confounded_digits, coco, or tiny_imagenet with its box files"):
        data.require_boxes()
    assert len(list(data.evaluation_loader("test", region="full"))) == 1
