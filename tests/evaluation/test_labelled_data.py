"""What an evaluation reads: the merged data node, and only labelled images."""

import pytest
import torch
from PIL import Image

from metamask_plugin.data import MemoryImages
from metamask_plugin.data.registry import Dataset
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import labelled_data
from metamask_plugin.evaluation.labelled_data import LabelledData, merged_data

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


def test_no_data_set_and_a_format_that_is_not_read_are_named():
    with pytest.raises(UserError, match="data.dataset must be given"):
        merged_data({}, {})
    with pytest.raises(UserError, match="data.format must be image_folder or dali .* got 'h5'"):
        merged_data(TRAINED, {"format": "h5"})
    assert merged_data(TRAINED, {"format": "dali"})["dataset"] == "confounded_digits"


def images(labels):
    pixels = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32)
    return MemoryImages(pixels.clone(), torch.tensor(labels), ["a", "b"])


def fake(monkeypatch, train, test):
    dataset = Dataset(
        "digits", images(train), None if test is None else images(test), 2, (0.0,) * 3, (1.0,) * 3
    )
    monkeypatch.setattr(labelled_data, "load_dataset", lambda data: dataset)
    return LabelledData({"dataset": "digits"}, 32, batch_size=2)


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
    data = LabelledData(node, 16, mean=[0.5] * 3, std=[0.5] * 3)
    ((x, y),) = data.evaluation_loader("test")
    assert x.shape == (2, 3, 16, 16)
    assert x[:, 0, 0, 0].tolist() == [-1, 1]
    assert y.tolist() == [0, 1]
    assert data.num_classes == 2
