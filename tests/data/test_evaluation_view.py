"""The evaluation view: solo-learn's for each data set, the same for every evaluator."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from torchvision import transforms

from metamask_plugin.data import EvaluationView, FileImages, PretrainDataModule
from metamask_plugin.data.registry import DATASETS, Dataset, evaluation_resize, load_dataset
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data

LARGE = ("imagenet", "imagenet100", "custom", "coco", "tiny_imagenet")


@pytest.mark.parametrize("name", DATASETS)
def test_the_default_is_solo_learns(name):
    assert evaluation_resize(name, 224) == (256 if name in LARGE else 224)
    for size in (28, 32, 64, 96):
        assert evaluation_resize(name, size) == size, "small images are seen whole"
    assert evaluation_resize(name, 224, 224) == 224 and evaluation_resize(name, 32, 36) == 36


@pytest.mark.parametrize("given", [223, 0])
def test_a_resize_below_the_crop_is_refused(given):
    with pytest.raises(UserError, match="data.evaluation_resize must be a whole number of at least the crop"):
        evaluation_resize("imagenet", 224, given)


def framed(width=256, height=256):
    """A white frame of ten pixels round black."""
    pixels = np.zeros((height, width, 3), "uint8")
    pixels[:10] = pixels[-10:] = pixels[:, :10] = pixels[:, -10:] = 255
    return Image.fromarray(pixels)


def test_it_shows_what_solo_learns_shows():
    solo = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()])
    image = framed()
    view = EvaluationView(224, (0, 0, 0), (1, 1, 1), 256)
    assert torch.equal(view(image), solo(image)) and view(image).max() == 0
    assert EvaluationView(224, (0, 0, 0), (1, 1, 1))(image).max() == 1
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (180, 300, 3), dtype=np.uint8))
    bicubic = transforms.Resize(256, transforms.InterpolationMode.BICUBIC)
    assert torch.equal(view(noise), solo.transforms[2](solo.transforms[1](bicubic(noise))))


@pytest.fixture
def trees(tmp_path):
    for split in ("train", "val"):
        for i, name in enumerate(("cat", "dog")):
            (tmp_path / split / name).mkdir(parents=True)
            framed(300, 256 + i).save(tmp_path / split / name / "0.png")
    return {"train_path": str(tmp_path / "train"), "val_path": str(tmp_path / "val")}


def views(loader):
    return torch.cat([images for images, _ in loader])


@pytest.mark.parametrize("given", [None, 224, 240])
@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
def test_training_and_evaluators_see_the_same(trees, pipeline, given):
    data = {"dataset": "custom", "num_workers": 0, "pipeline": pipeline, "evaluation_resize": given, **trees}
    entry = {"crop_size": 224, "num_crops": 2}
    cfg = OmegaConf.create({"data": data, "augmentations": [entry], "optimizer": {"batch_size": 2}})
    trained = PretrainDataModule(load_dataset(data), cfg)
    expected = EvaluationView(224, trained.dataset.mean, trained.dataset.std, given or 256)
    files = [FileImages.image(load_dataset(data).test, index) for index in range(2)]
    expected = torch.stack([expected(image) for image in files])
    evaluated = LabelledImages.read(
        merged_data({"data": data}, {"pipeline": pipeline, "num_workers": 0}), 224
    )
    seen = [
        views(trained.val_dataloader()),
        views(LabelledImages.of_run(trained).evaluation_loader("test")),
        views(evaluated.evaluation_loader("test")),
        LabelledImages.of_run(trained).samples(2),
    ]
    tolerance = 0.03 if pipeline == "kornia" else 0  # rounded to whole grey levels
    for images in seen:
        assert images.shape == (2, 3, 224, 224) and (images - expected).abs().max() <= tolerance


def test_another_data_set_has_its_own_resize():
    trained = {"data": {"dataset": "custom", "evaluation_resize": 300}}
    assert merged_data(trained, {})["evaluation_resize"] == 300
    assert merged_data(trained, {"evaluation_resize": 260})["evaluation_resize"] == 260
    assert "evaluation_resize" not in merged_data(trained, {"dataset": "digits"})


def test_small_images_are_bit_by_bit_as_ever():
    node = {"dataset": "digits", "kwargs": {"size": 32}}
    found = LabelledImages.read(node, 32)
    assert isinstance(load_dataset(node), Dataset)
    split = found.images("test")
    images = views(found.evaluation_loader("test"))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (found._view.mean, found._view.std))
    expected = (split.images.float() / 255 - mean) / std
    assert torch.equal(images, expected)
