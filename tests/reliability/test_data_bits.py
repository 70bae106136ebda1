"""Images with 16 bits a channel that use fewer."""

import numpy as np
import pytest
import torch
from image_faults import make_tree
from omegaconf import OmegaConf
from PIL import Image

from metamask_plugin.data import PretrainDataModule, load_dataset, region_of
from metamask_plugin.data.images import read_rgb
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data

pytestmark = pytest.mark.fault(
    "data", source="python-pillow/Pillow#2574, python-pillow/Pillow#5991, python-pillow/Pillow#6765"
)


def scan(bits, seed=0):
    values = np.random.default_rng(seed).integers(0, 2**bits, (16, 20), dtype=np.uint16)
    values[0, 0] = 2**bits - 1
    return Image.fromarray(values)


def make_scans(root, bits, ending="png"):
    for label, name in enumerate(("cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(4):
            scan(bits, 4 * label + i).save(root / name / f"{i}.{ending}")
    return root


def module(tree, **data):
    data = {"dataset": "custom", "train_path": str(tree), "num_workers": 0, **data}
    cfg = {"data": data, "augmentations": [{"crop_size": 16}], "optimizer": {"batch_size": 2}}
    return PretrainDataModule(load_dataset(data), OmegaConf.create(cfg))


def said(capfd):
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_all_of_the_bits_that_are_used_are_scaled(tmp_path, ending):
    scan(12).save(tmp_path / f"a.{ending}")
    path, values = str(tmp_path / f"a.{ending}"), np.asarray(scan(12)).astype(int)
    expected = (values * 255 + 2047) // 4095
    assert np.array_equal(np.asarray(read_rgb(path, bits=12))[..., 0], expected)
    assert np.asarray(read_rgb(path)).max() <= 16
    assert np.asarray(read_rgb(path, bits=8)).max() == 255, "what is larger is white"


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
@pytest.mark.parametrize(("bits", "key"), [(9, 10), (10, 10), (12, 12), (14, 14), (15, 15)])
def test_dark_images_are_said_with_the_key_to_set(tmp_path, pipeline, bits, key, capfd):
    tree = make_scans(tmp_path / "train", bits)
    module(tree, pipeline=pipeline)
    (warning,) = said(capfd)
    assert warning.startswith("warning: train images with 16-bit grey use") and f"data.bits={key}" in warning
    data = module(tree, pipeline=pipeline, bits=key)
    assert said(capfd) == []
    pixels = np.stack([np.asarray(data.dataset.train.image(i)) for i in range(8)])
    assert pixels.max() > 120 and pixels.mean() > 60


def test_no_news_is_said(tmp_path, capfd):
    module(make_scans(tmp_path / "scans", 16))
    module(make_tree(tmp_path / "train"))
    module(make_scans(tmp_path / "dark", 10), bits=12)  # who sets the bits knows
    assert said(capfd) == []


def test_values_that_become_white_are_said(tmp_path, capfd):
    module(make_scans(tmp_path / "train", 16), bits=12)
    assert "values above 4095 become white; set data.bits=16" in said(capfd)[0]


def test_a_few_scans_among_many_photographs_are_found(tmp_path, capfd):
    tree = make_tree(tmp_path / "train", images=20)
    scan(12).save(tree / "cat" / "7.png")
    module(tree)
    assert "use 12 bits" in said(capfd)[0]


def test_every_reader_scales_alike(tmp_path, capfd):
    tree = make_scans(tmp_path / "train", 12)
    files, memory = (module(tree, bits=12, pipeline=name).dataset.train for name in ("torchvision", "kornia"))
    assert files.subset([3]).image(0).getpixel((0, 0)) == (255, 255, 255)
    assert memory.images.max() == 255
    whole = load_dataset({"dataset": "custom", "train_path": str(tree), "bits": 12}).train
    whole.boxes = torch.tensor([[0, 0, 20, 16]] * 8, dtype=torch.int32)
    assert region_of(whole, "foreground").image(0).getpixel((0, 0)) == (255, 255, 255)
    trained = {"data": {"dataset": "custom", "train_path": str(tree), "val_path": str(tree), "bits": 12}}
    evaluated = LabelledImages.read(merged_data(trained, {"num_workers": 0}), 16)
    images, _ = next(iter(evaluated.evaluation_loader("test")))
    assert images.max() > 2
    assert "bits" not in merged_data(trained, {"dataset": "digits"})
    said(capfd)


def test_bits_of_images_that_are_no_files_are_one_line():
    with pytest.raises(UserError, match="data.bits must be null for digits, whose images are no files"):
        load_dataset({"dataset": "digits", "bits": 12})


def test_dali_scales_16_bits_alone(tmp_path):
    pytest.importorskip("nvidia.dali")
    data = module(make_scans(tmp_path / "train", 12), bits=12, format="dali")
    with pytest.raises(UserError, match="data.bits must be null with data.format=dali"):
        data.setup("fit")
