"""Encoders that do not see the whole image, and other devices: one line before anything is trained."""

import lightning.fabric.accelerators.mps as fabric_mps
import lightning.pytorch.accelerators.mps as lightning_mps
import pytest
import torch
from test_config_faults import Started, config, refused  # noqa: F401

from metamask_plugin.cli import linear, pretrain
from metamask_plugin.cli.config import complete
from metamask_plugin.cli.known import shipped
from metamask_plugin.cli.machine import device_count, device_title, device_type
from metamask_plugin.errors import UserError

PATCHES = "huggingface/pytorch-image-models#597"
APPLE = "facebookresearch/segment-anything#408, facebookresearch/segment-anything#453, pytorch/pytorch#122602"

BLIND = {
    "backbone.name=vit_tiny_patch16_224 augmentations.0.crop_size=28 ++backbone.kwargs.depth=2": (
        "augmentations.0.crop_size must be a multiple of the patch 16, got 28: the features do not depend on "
        "the outer 12 pixels; set augmentations.0.crop_size=16 or 32, or backbone.kwargs.patch_size=14"
    ),
    "backbone.name=mixer_s32_224 augmentations.0.crop_size=48": "multiple of the patch 32, got 48",
}


@pytest.mark.fault("encoders", source=PATCHES)
@pytest.mark.parametrize("overrides", BLIND)
def test_an_unseen_border(refused, overrides):  # noqa: F811
    assert BLIND[overrides] in refused(config("accelerator=cpu", *overrides.split(" ")))


@pytest.mark.fault("encoders", source=PATCHES)
def test_an_unseen_border_of_small_crops_names_their_key():
    cfg = config("accelerator=cpu", "backbone.name=conv", "augmentations.0.crop_size=64")
    small = cfg.augmentations[0].copy()
    small.crop_size = 28
    cfg.augmentations.append(small)
    with pytest.raises(
        UserError,
        match=r"augmentations.1.crop_size must be a size whose border the encoder sees, got 28: .* outer 5",
    ):
        complete(cfg)


def test_the_remedies_are_accepted():
    sizes = []
    for remedy in ("augmentations.0.crop_size=32", "++backbone.kwargs.patch_size=14"):
        overrides = ["augmentations.0.crop_size=28", remedy] if "patch" in remedy else [remedy]
        words = ["accelerator=cpu", "backbone.name=vit_tiny_patch16_224", "++backbone.kwargs.depth=2"]
        cfg = complete(config(*words, *overrides))
        sizes.append((cfg.augmentations[0].crop_size, cfg.backbone.kwargs.get("patch_size")))
    assert sizes == [(32, None), (28, 14)]


def test_dropped_pixels_of_a_convolution_are_noted(capsys):
    complete(config("accelerator=cpu", "backbone.name=conv", "augmentations.0.crop_size=84"))
    assert "note: backbone.name=conv does not see the outer 5 pixels" in capsys.readouterr().err


@pytest.fixture
def apple(monkeypatch):
    """A machine with MPS and without CUDA; what asks CUDA for a name fails there."""

    def none_there(*args):
        raise AssertionError("torch.cuda was asked")

    for module in (lightning_mps, fabric_mps):
        monkeypatch.setattr(module.MPSAccelerator, "is_available", staticmethod(lambda: True))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", none_there)


@pytest.mark.fault("encoders", source=APPLE)
def test_auto_is_the_cpu_where_there_is_no_cuda(apple, monkeypatch, tmp_path):
    asked = {}

    def trainer(**kwargs):
        asked.update(kwargs)
        raise Started

    monkeypatch.setattr(pretrain.pl, "Trainer", trainer)
    cfg = config("accelerator=auto", "++evaluation.enabled=False", f"checkpoint.dir={tmp_path}")
    with pytest.raises(Started):
        pretrain.run(cfg)
    assert (asked["accelerator"], asked["devices"]) == ("cpu", 1)
    assert device_title(cfg) == "CPU"


@pytest.mark.fault("encoders", source=APPLE)
def test_mps_is_named_and_counted_without_cuda(apple, capsys):
    cfg = complete(config("accelerator=mps", "devices=auto"))
    assert (device_type("mps"), device_count(cfg), device_title(cfg)) == ("mps", 1, "MPS")
    assert "note: accelerator=mps has not been tested" in capsys.readouterr().err


@pytest.mark.fault("encoders", source=APPLE)
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("task=wmse", "method_kwargs.task must be one without float64 with accelerator=mps, got 'wmse'"),
        ("precision=64-true", "precision must be another than 64-true with accelerator=mps"),
        ("devices=2", "devices must be 1 with accelerator=mps"),
        ("accelerator=gpu", "accelerator must be auto or cpu where no GPU is found"),
    ],
)
def test_what_mps_lacks_is_refused(apple, override, line):
    with pytest.raises(UserError, match=line):
        complete(config("accelerator=mps", override))


@pytest.mark.fault("encoders", source=APPLE)
def test_the_linear_evaluator_takes_and_refuses_the_same(refused):  # noqa: F811
    if torch.backends.mps.is_available():
        pytest.skip("needs a machine without MPS")
    cfg = config("accelerator=mps", kind="linear", name=shipped("linear")[0])
    assert "accelerator must be auto or cpu where torch finds no MPS" in refused(cfg, linear.run)


@pytest.mark.fault("config")
def test_a_list_of_gpus_on_the_cpu_is_noted(capsys):
    complete(config("accelerator=cpu", "devices=[0,1]"))
    assert "note: devices=[0, 1] names GPUs: one process trains here, on CPU" in capsys.readouterr().err
