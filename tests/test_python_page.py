"""Every block of docs/python.md runs, one after the other, and what it trains moves."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from metamask_plugin.methods import ICLMSR, Baseline

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "python.md").read_text()
METHOD, LOOP, LIGHTLY = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture(scope="module")
def names():
    torch.manual_seed(0)
    names = {}
    exec(METHOD, names)
    return names


def moved(mask):
    return mask.statistics()["mask_std"] > 1e-3


def test_a_method_on_ones_own_encoder(names):
    assert moved(names["method"].mask) and names["trainer"].current_epoch == 2
    assert "train_trial_gain" in names["trainer"].callback_metrics


def test_the_mask_in_a_loop_and_with_lightlys_modules(names):
    exec(LOOP, names)
    assert moved(names["mask"])
    if importlib.util.find_spec("lightly") is None:
        pytest.skip("lightly is not installed")
    before = names["mask"].values().clone()
    exec(LIGHTLY, names)
    assert not torch.equal(before, names["mask"].values())


def test_the_other_methods_take_an_encoder_too(names):
    encoder = names["small_encoder"]()
    settings = {"num_classes": 10, "image_size": 16, "batch_size": 64, "max_epochs": 1}
    assert Baseline(encoder, task="byol", **settings).backbone is encoder
    method = ICLMSR(
        encoder, original_size=20, regularizer={"name": "conv4", "kwargs": {"width": 8}}, **settings
    )
    assert method.regularizer is not None and method.num_crops == 2
