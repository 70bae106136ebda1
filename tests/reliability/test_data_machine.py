"""Disks and networks that fail, images that grow when they are resized, and repeated starts."""

import errno
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from image_faults import encoded, inject, make_tree, png_chunk
from omegaconf import OmegaConf

from metamask_plugin import retry
from metamask_plugin.cli import verify as verify_folders
from metamask_plugin.data import (
    PretrainDataModule,
    image_file,
    load_dataset,
    verified_before,
)
from metamask_plugin.data.unreadable import InvalidImages, MachineFault, UnreadableImage
from metamask_plugin.data.verify import unreadable
from metamask_plugin.evaluation.labelled_images import LabelledImages

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


def node(tree, **options):
    return {"dataset": "custom", "train_path": str(tree), "num_workers": 0, **options}


def module(tree, **options):
    data = node(tree, **options)
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

    monkeypatch.setattr(image_file, "open", open_, raising=False)


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
@pytest.mark.parametrize("code", AWAY)
def test_an_image_that_is_away_for_a_moment_is_read_again(tree, pipeline, code, monkeypatch, waits, capfd):
    fail(monkeypatch, 4, code, tree / "cat" / "1.jpg")
    assert len(module(tree, pipeline=pipeline, invalid_images="skip").dataset.train) == 8
    assert waits == [0.1, 0.2, 0.4, 0.8] and capfd.readouterr().err == ""


@pytest.mark.parametrize("on_invalid", ["stop", "skip"])
@pytest.mark.parametrize("code", AWAY)
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


@pytest.mark.parametrize("times", [2, 99])
def test_a_folder_that_is_away(tree, times, monkeypatch, waits):
    left, scandir = [times], os.scandir

    def scan(path="."):
        if os.fspath(path) == str(tree / "dog" / "small") and left[0]:
            left[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return scandir(path)

    make_tree(tree / "dog", ("small",))
    monkeypatch.setattr(os, "scandir", scan)
    if times == 2:
        assert len(load_dataset(node(tree)).train) == 12
    else:
        with pytest.raises(MachineFault, match="small must be readable, got Stale file handle"):
            load_dataset(node(tree, invalid_images="skip"))


@pytest.mark.parametrize("times", [2, 99])
@pytest.mark.parametrize("name", ["coco", "tiny_imagenet", "cifar10"])
def test_files_beside_the_images_that_are_away(tree, tmp_path, name, times, monkeypatch, waits):
    """What is wrong with them is said as ever; that they are away is no reason to fetch them anew."""
    left = [times]

    def away(*args, **kwargs):
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error")
        raise ValueError("what they hold") if name != "cifar10" else RuntimeError("what they hold")

    data = {"dataset": name, "train_path": str(tree), "kwargs": {}}
    if name == "coco":
        data["kwargs"]["train_annotations"] = str(tmp_path / "coco.json")
        monkeypatch.setattr(Path, "read_bytes", away)
    elif name == "tiny_imagenet":
        (tree / "cat" / "cat_boxes.txt").touch()
        monkeypatch.setattr(Path, "read_text", away)
    else:
        (tree / "cifar-10-batches-py").mkdir()
        monkeypatch.setattr("metamask_plugin.data.torchvision_sets.CIFAR10", away)
    with pytest.raises(ValueError) as error:
        load_dataset(data)
    if times == 2:
        assert "what they hold" in str(error.value) and len(waits) == 2
    else:
        assert isinstance(error.value, MachineFault) and "no fault of the file" in str(error.value)


def test_other_errors_are_not_repeated(waits):
    def action():
        raise PermissionError(errno.EACCES, "denied")

    with pytest.raises(PermissionError):
        retry.retried(action)
    assert waits == []


def elongated(width, height):
    """A PNG of black and white pixels, whole and small."""
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\1\0\0\0\0"
    rows = zlib.compress((b"\0" + bytes(-(-width // 8))) * height, 9)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("size", [(20_000_000, 1), (1, 20_000_000), (2_000_000, 2)])
def test_an_image_that_explodes_when_resized_is_refused(tree, tmp_path, split, size, pipeline):
    make_tree(tmp_path / "val")
    bad = tmp_path / split / "cat" / "0.jpg"
    bad.write_bytes(elongated(*size))
    assert bad.stat().st_size < 2_000_000
    with pytest.raises(InvalidImages, match="whose shorter side resized to 32 makes") as error:
        module(tree, val_path=str(tmp_path / "val"), pipeline=pipeline)
    assert str(bad) in str(error.value)


def test_it_is_refused_where_it_is_evaluated_and_where_nothing_is_verified(tree, tmp_path):
    make_tree(tmp_path / "val")
    bad = tmp_path / "val" / "cat" / "0.jpg"
    bad.write_bytes(elongated(20_000_000, 1))
    data = node(tree, val_path=str(tmp_path / "val"))
    with pytest.raises(InvalidImages, match="resized to 32 makes"):
        LabelledImages.read(data, 32)
    loader = LabelledImages.read({**data, "verify": "none"}, 32).evaluation_loader("test")
    with pytest.raises(UnreadableImage, match="resized to 32 makes") as error:
        list(loader)
    assert str(bad) in str(error.value)


def test_long_images_that_stay_small_are_read(tree):
    (tree / "cat" / "0.jpg").write_bytes(elongated(10_000, 1))
    assert len(module(tree, pipeline="kornia").dataset.train) == 8


def test_a_long_box_is_not_put_on_a_huge_square(tree):
    (tree / "cat" / "0.jpg").write_bytes(elongated(60_000, 1))
    dataset = load_dataset(node(tree))
    dataset.train.boxes = torch.tensor([[0, 0, 60_000, 1]] * 8, dtype=torch.int32)
    seen = dataset.in_region("foreground", "zoom").train
    with pytest.raises(UnreadableImage, match="a box with a side of 60000 pixels"):
        seen.image(0)


@pytest.fixture
def records(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(verified_before, "RECORDED_FROM", 1)
    return tmp_path / "cache" / "metamask_plugin" / "verified"


@pytest.fixture
def opened(monkeypatch):
    opened = []

    def open_(name, *args):
        opened.append(name)
        return open(name, *args)

    monkeypatch.setattr(image_file, "open", open_, raising=False)
    return opened


def verifications(tree, opened, **options):
    opened.clear()
    module(tree, **options)
    return len(opened)


def test_files_that_have_not_changed_are_verified_once(tree, records, opened, monkeypatch):
    monkeypatch.setattr("metamask_plugin.data.verify.tell_unused_bits", lambda *args: None)
    assert [verifications(tree, opened) for _ in range(3)] == [8, 0, 0]
    assert len(list(records.iterdir())) == 1
    assert verifications(tree, opened, verify="decode") == 8, "it finds more"
    assert verifications(tree, opened) == 0
    (tree / "cat" / "1.jpg").write_bytes(encoded("JPEG"))
    assert verifications(tree, opened) == 8
    state = (tree / "cat" / "1.jpg").stat()
    (tree / "cat" / "1.jpg").write_bytes(b"\0" + encoded("JPEG")[1:])
    os.utime(tree / "cat" / "1.jpg", ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(InvalidImages):
        module(tree)


def test_what_is_to_be_skipped_is_remembered_too(tree, records, opened):
    inject("web page", tree / "cat" / "1.jpg")
    skipped = [module(tree, invalid_images="skip").dataset.skipped for _ in range(2)]
    assert skipped[0] == skipped[1] and len(skipped[0]) == 1
    (record,) = records.iterdir()
    assert json.loads(record.read_text()) == {"1": "no image of a known format"}
    inject("zero bytes", tree / "cat" / "1.jpg")
    (image,) = module(tree, invalid_images="skip").dataset.skipped
    assert image.reason == "an empty file"


@pytest.mark.parametrize("damage", [b"", b"[1]", b"\xff", b'{"a": "b"}'])
def test_a_record_that_is_damaged_is_made_anew(tree, records, opened, damage):
    module(tree)
    (record,) = records.iterdir()
    record.write_bytes(damage)
    assert verifications(tree, opened) >= 8
    assert json.loads(record.read_text()) == {}


def test_without_a_place_for_records_the_files_are_verified_again(tree, monkeypatch, opened, tmp_path):
    monkeypatch.setattr(verified_before, "RECORDED_FROM", 1)
    (tmp_path / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a file"))
    assert verifications(tree, opened) == verifications(tree, opened) > 0


@pytest.mark.parametrize("sound", [True, False])
def test_of_processes_that_start_together_one_verifies(tree, records, opened, sound):
    """As under torchrun; threads, each with its own handle of the lock, stand for them."""
    if not sound:
        inject("web page", tree / "cat" / "1.jpg")
    paths = load_dataset(node(tree)).train.paths
    calls = []

    def verify():
        calls.append(1)
        return unreadable(paths, "header")

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: verified_before.remembered(paths, "header", verify), range(4)))
    assert found == [{} if sound else {1: "no image of a known format"}] * 4 and len(calls) == 1
    assert [record.suffix for record in records.iterdir()] == [".json"]


def test_a_small_data_set_leaves_no_record(tree, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    module(tree)
    assert not Path(tmp_path / "cache").exists()
