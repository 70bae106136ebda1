"""A file that is no sound image: the run stops before it trains, in one line, or goes on where asked to."""

import os
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
from image_faults import FAULTS, encoded, inject, make_tree, png_claiming
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.cli import verify as verify_folders
from metamask_plugin.data import FileImages, PretrainDataModule, load_dataset
from metamask_plugin.data.images import UnreadableImage
from metamask_plugin.data.verify import InvalidImages
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.labelled_images import LabelledImages

pytestmark = pytest.mark.fault("data")
AUGMENTATIONS = [{"crop_size": 8, "num_crops": 2}]


@pytest.fixture
def tree(tmp_path):
    return make_tree(tmp_path / "train")


def node(tree, **options):
    return {"dataset": "custom", "train_path": str(tree), "num_workers": 0, **options}


def module(tree, batch_size=2, **options):
    data = node(tree, **options)
    cfg = {"data": data, "augmentations": AUGMENTATIONS, "optimizer": {"batch_size": batch_size}}
    return PretrainDataModule(load_dataset(data), OmegaConf.create(cfg))


def message(error, path=None):
    text = str(error.value)
    assert "\n" not in text and text.isprintable()
    if path is not None:
        assert str(path) in text
    return text


def batches(data):
    return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_stops_the_run_before_it_trains(tree, fault, pipeline, capfd):
    bad = tree / "cat" / "1.jpg"
    inject(fault, bad)
    if fault == "vanished":
        data = module_of_a_vanished_image(tree, bad, pipeline)
    else:
        data = partial(module, tree, pipeline=pipeline)
    with pytest.raises(InvalidImages) as error:
        data()
    assert message(error, bad).startswith("image file ") and "invalid_images=skip" in message(error)
    assert [image.path for image in error.value.images] == [str(bad)]

    going_on = data(invalid_images="skip")
    assert [image.path for image in going_on.dataset.skipped] == [str(bad)] and len(
        going_on.dataset.train
    ) == 7
    assert len(batches(going_on)) == 3
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("warning: left out 1 ") and str(bad) in said[0]


def module_of_a_vanished_image(tree, path, pipeline):
    """Listed while it was there."""
    Image.new("RGB", (8, 8)).save(path)
    dataset = load_dataset(node(tree))
    path.unlink()

    def build(**options):
        data = node(tree, pipeline=pipeline, **options)
        cfg = {"data": data, "augmentations": AUGMENTATIONS, "optimizer": {"batch_size": 2}}
        return PretrainDataModule(dataset, OmegaConf.create(cfg))

    return build


def test_damage_inside_is_found_where_every_file_is_decoded(tree):
    bad = tree / "dog" / "2.jpg"
    bad.write_bytes(png_claiming(20, 20))
    assert len(module(tree).dataset.train) == 8, "its checksums are right, and nothing else was looked at"
    with pytest.raises(InvalidImages) as error:
        module(tree, verify="decode")
    message(error, bad)
    assert len(module(tree, invalid_images="skip").dataset.train) == 7


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("fault", ["JPEG cut in half", "vanished"])
@pytest.mark.parametrize("verify", ["header", "none"])
def test_a_file_that_changes_after_it_was_verified_is_one_line(tree, fault, workers, verify):
    data = module(tree, batch_size=8, num_workers=workers, verify=verify)
    inject(fault, tree / "cat" / "1.jpg")
    with pytest.raises(UnreadableImage) as error:
        batches(data)
    message(error, tree / "cat" / "1.jpg")


def test_many_faults_of_both_splits_are_one_line_and_one_list(tree, tmp_path, capsys):
    make_tree(tmp_path / "val")
    bad = [tree / "cat" / "0.jpg", tree / "dog" / "3.jpg", tmp_path / "val" / "cat" / "2.jpg"]
    for path in bad:
        inject("zero bytes", path)
    with pytest.raises(InvalidImages) as error:
        module(tree, val_path=str(tmp_path / "val"))
    assert "got 3 of 16 that are not" in message(error, bad[0]) and "metamask-ssl verify" in message(error)
    assert [image.path for image in error.value.images] == [str(path) for path in bad]
    assert str(pickle.loads(pickle.dumps(error.value))) == str(error.value)
    assert verify_folders.main([str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out.splitlines() == [f"{path}: an empty file" for path in bad]
    assert err == "3 of 16 images cannot be read\n"
    assert verify_folders.main([str(tree / "dog"), "--decode"]) == 1
    bad[1].unlink()
    assert verify_folders.main([str(tree / "dog"), "--decode"]) == 0
    with pytest.raises(SystemExit, match="2"):
        verify_folders.main([str(tree / "gone")])

    inject("zero bytes", bad[1])
    data = module(tree, val_path=str(tmp_path / "val"), invalid_images="skip")
    assert [image.path for image in data.dataset.skipped] == [str(path) for path in bad]
    assert (len(data.dataset.train), len(data.dataset.test)) == (6, 7)
    assert data.dataset.skipped == data.full.skipped and len(data.full.train) == 6


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
def test_skipping_may_not_empty_a_class_or_leave_less_than_half(tmp_path, pipeline):
    tree = make_tree(tmp_path / "train", ("ant", "bee", "cat"), 2)
    options = {"pipeline": pipeline, "invalid_images": "skip"}
    for name in ("0.jpg", "1.jpg"):
        inject("web page", tree / "bee" / name)
    with pytest.raises(UserError, match="must leave every class an image.*'bee'") as error:
        module(tree, **options)
    message(error)
    for name in ("ant", "cat"):
        inject("zero bytes", tree / name / "0.jpg")
    with pytest.raises(UserError, match="more than half.*4 of 6 train images") as error:
        module(tree, **options)
    message(error)


def test_a_batch_must_fit_into_what_was_not_skipped(tree):
    inject("zero bytes", tree / "cat" / "0.jpg")
    assert len(module(tree, batch_size=7, invalid_images="skip").dataset.train) == 7
    with pytest.raises(UserError, match="optimizer.batch_size must be at most 7"):
        module(tree, batch_size=8, invalid_images="skip")


def test_dali_reads_nothing_that_was_not_verified(tree):
    inject("zero bytes", tree / "cat" / "0.jpg")
    with pytest.raises(InvalidImages) as error:
        module(tree, format="dali")
    message(error, tree / "cat" / "0.jpg")
    assert len(module(tree, format="dali", invalid_images="skip").dataset.train) == 7


def test_an_evaluator_stops_and_goes_on_likewise(tree, tmp_path, capfd):
    make_tree(tmp_path / "val")
    inject("JPEG cut in half", tmp_path / "val" / "dog" / "3.jpg")
    data = node(tree, val_path=str(tmp_path / "val"))
    with pytest.raises(InvalidImages) as error:
        LabelledImages.read(data, 8)
    message(error, tmp_path / "val" / "dog" / "3.jpg")
    evaluation = LabelledImages.read({**data, "invalid_images": "skip"}, 8)
    assert (
        torch.cat([labels for _, labels in evaluation.evaluation_loader("test")]).tolist()
        == [0] * 4 + [1] * 3
    )
    assert len(capfd.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"verify": "all"}, "data.verify must be one of decode, header, none, got 'all'"),
        (
            {"verify": "none", "invalid_images": "skip"},
            "data.verify must be header or decode with data.invalid",
        ),
        ({"invalid_images": "ignore"}, "data.invalid_images must be one of skip, stop, got 'ignore'"),
    ],
)
def test_unknown_settings_are_one_line(tree, options, expected):
    with pytest.raises(UserError) as error:
        module(tree, **options)
    assert message(error).startswith(expected)


NAMES = {
    "newline": b"a\nb.jpg",
    "unicode": "k\u00e4tzchen \u732b.jpg".encode(),
    "escape sequence": b"\x1b[31mred.jpg",
    "not UTF-8": b"k\xe4tzchen.jpg",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
def test_file_names_of_any_kind(tree, name, pipeline, capfd):
    path = Path(os.fsdecode(os.fsencode(tree / "cat") + b"/" + NAMES[name]))
    path.write_bytes(encoded("JPEG"))
    data = module(tree, pipeline=pipeline)
    assert len(data.full.train) == 9 and len(batches(data)) == 4 and len(data.full.fingerprint()) == 16
    path.write_bytes(b"")
    with pytest.raises(InvalidImages) as error:
        module(tree, pipeline=pipeline)
    assert message(error).encode()
    assert error.value.images[0].path == str(path) and len(str(error.value.images[0]).splitlines()) == 1
    assert len(module(tree, pipeline=pipeline, invalid_images="skip").dataset.train) == 8
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_faults_come_in_the_order_of_the_images_whatever_the_threads_do(tmp_path):
    tree = make_tree(tmp_path / "train", tuple("abcdef"), 50)
    bad = [tree / name / f"{i}.jpg" for name in "abcdef" for i in range(0, 50, 7)]
    for path in bad:
        inject("zero bytes", path)
    found = [module(tree, invalid_images="skip").dataset for _ in range(3)]
    assert all([Path(image.path) for image in dataset.skipped] == sorted(bad) for dataset in found)
    assert len({dataset.fingerprint() for dataset in found}) == 1


def test_a_region_is_skipped_along_with_its_image(tree):
    inject("zero bytes", tree / "cat" / "0.jpg")
    files = load_dataset(node(tree))
    boxes = torch.tensor([[i, 0, i + 4, 8] for i in range(8)], dtype=torch.int32)
    files.train.boxes = boxes
    for pipeline in ("torchvision", "kornia"):
        data = node(tree, pipeline=pipeline, region="foreground", invalid_images="skip")
        cfg = {"data": data, "augmentations": AUGMENTATIONS, "optimizer": {"batch_size": 2}}
        built = PretrainDataModule(files, OmegaConf.create(cfg))
        assert torch.equal(built.full.train.boxes, boxes[1:]) and len(built.dataset.train) == 7
        assert isinstance(built.full.train, FileImages) and len(built.dataset.skipped) == 1
