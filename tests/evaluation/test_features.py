"""Feature extraction: values, order, and what must be untouched afterwards."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import extract_features, raw_pixels
from metamask_plugin.modules.encoders import Conv4


def images(count=10, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 3, size, size, generator=generator), torch.arange(count) % 3)


def loader(dataset, batch_size=4):
    return DataLoader(dataset, batch_size=batch_size)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return Conv4(width=2)


def test_features_equal_the_evaluation_mode_forward_image_by_image(backbone, capsys):
    data = images()
    features = extract_features(backbone, loader(data), bar="features")
    assert capsys.readouterr() == ("", ""), "no bar without a terminal"
    backbone.eval()
    with torch.no_grad():
        expected = torch.cat([backbone(x[None]) for x, _ in data])
    torch.testing.assert_close(features.feats, expected)
    assert features.labels.tolist() == [int(y) for _, y in data]
    assert features.feats.dtype == torch.float32
    assert not features.feats.requires_grad


def test_modes_statistics_and_generators_are_untouched(backbone):
    backbone.train()
    backbone.layers[1].eval()
    flags = [module.training for module in backbone.modules()]
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    extract_features(backbone, loader(images()))
    assert [module.training for module in backbone.modules()] == flags
    for name, buffer in backbone.named_buffers():
        assert torch.equal(buffer, buffers[name]), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_half_precision_encoders_give_float32_features(backbone):
    half = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).bfloat16()
    data = TensorDataset(torch.zeros(3, 3, 16, 16, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.long))
    assert extract_features(half, loader(data)).feats.dtype == torch.float32


class Diverged(nn.Module):
    """NaN for the images whose first pixel is positive."""

    def forward(self, x):
        return torch.where(x[:, 0, 0, :1] > 0, float("nan"), x.flatten(1)[:, :4])


def test_non_finite_features_are_counted_and_blamed_on_the_training():
    data = images()
    bad = int((data.tensors[0][:, 0, 0, 0] > 0).sum())
    model = Diverged().train()
    with pytest.raises(UserError, match=f"for {bad} of 10 images.*diverged"):
        extract_features(model, loader(data))
    assert model.training


def test_non_finite_images_are_blamed_on_the_data(backbone):
    data = images()
    data.tensors[0][4, 1, 2, 3] = float("inf")
    with pytest.raises(UserError, match="for 1 of 10 images; 1 of the input images"):
        extract_features(backbone, loader(data))


def test_an_unpooled_feature_map_and_an_empty_loader_are_refused(backbone):
    with pytest.raises(UserError, match=r"shape \(N, D\), got \(4, 3, 16, 16\)"):
        extract_features(nn.Identity(), loader(images()))
    with pytest.raises(UserError, match="evaluation images must be at least one"):
        extract_features(backbone, [])


def test_raw_pixels_are_the_images_in_order():
    data = images()
    features = raw_pixels(loader(data))
    assert torch.equal(features.feats, data.tensors[0].flatten(1))
    assert torch.equal(features.labels, data.tensors[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_another_device_gives_the_same_features_and_the_model_returns(backbone):
    here = extract_features(backbone, loader(images()))
    state = torch.cuda.get_rng_state()
    there = extract_features(backbone, loader(images()), device="cuda")
    torch.testing.assert_close(here.feats, there.feats, rtol=1e-3, atol=1e-4)
    assert there.feats.device.type == next(backbone.parameters()).device.type == "cpu"
    assert torch.equal(torch.cuda.get_rng_state(), state)
