"""Disks and networks that fail: tried again, then named, and never taken for a fault of the image."""

import errno
import os

import pytest
from image_faults import make_tree
from omegaconf import OmegaConf

from metamask_plugin import retry
from metamask_plugin.cli import verify as verify_folders
from metamask_plugin.data import PretrainDataModule, images, load_dataset
from metamask_plugin.data.images import MachineFault

pytestmark = pytest.mark.fault("data")
AWAY = ("EIO", "ESTALE", "ENOTCONN", "EBUSY", "ETIMEDOUT")


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "train")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would be waited."""
    waits = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    return waits


def module(tree, **options):
    data = {"dataset": "custom", "train_path": str(tree), "num_workers": 0, **options}
    cfg = {"data": data, "augmentations": [{"crop_size": 32}], "optimizer": {"batch_size": 2}}
    return PretrainDataModule(load_dataset(data), OmegaConf.create(cfg))


def fail(monkeypatch, times, code, path):
    """``open`` of one file fails so many times."""
    left = [times]

    def open_(name, *args):
        if name == str(path) and left[0]:
            left[0] -= 1
            raise OSError(getattr(errno, code), os.strerror(getattr(errno, code)), name)
        return open(name, *args)

    monkeypatch.setattr(images, "open", open_, raising=False)


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
@pytest.mark.parametrize("code", AWAY)
def test_an_image_that_is_away_for_a_moment_is_read_again(tree, pipeline, code, monkeypatch, waits, capfd):
    fail(monkeypatch, 4, code, tree / "cat" / "1.jpg")
    assert len(module(tree, pipeline=pipeline, invalid_images="skip").dataset.train) == 8
    assert waits == [0.1, 0.2, 0.4, 0.8] and capfd.readouterr().err == ""


@pytest.mark.parametrize("on_invalid", ["stop", "skip"])
@pytest.mark.parametrize("code", [*AWAY, "EMFILE"])
def test_a_disk_that_fails_for_good_is_named_and_never_skipped(tree, code, on_invalid, monkeypatch, waits):
    bad = tree / "cat" / "1.jpg"
    fail(monkeypatch, 99, code, bad)
    with pytest.raises(MachineFault) as error:
        module(tree, invalid_images=on_invalid)
    text = str(error.value)
    assert str(bad) in text and os.strerror(getattr(errno, code)) in text and "no fault of the file" in text
    assert "replace" not in text and "delete" not in text and "\n" not in text
    assert verify_folders.main([str(tree)]) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_while_training_it_is_the_same_line(tree, workers, monkeypatch, waits):
    data = module(tree, num_workers=workers)
    fail(monkeypatch, 99, "ESTALE", tree / "cat" / "1.jpg")
    with pytest.raises(MachineFault, match="which is no fault of the file"):
        list(data.train_dataloader())


def test_other_errors_are_not_repeated(waits):
    def action():
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        retry.retried(action)
    assert waits == []
