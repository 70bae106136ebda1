"""solo-learn's networks by its names, without solo-learn."""

import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.host import solo_networks
from metamask_plugin.host.solo_networks import IN_TIMM, NOT_IN_TIMM
from metamask_plugin.modules.encoders import build_encoder


@pytest.fixture(autouse=True)
def without_solo_learn(monkeypatch):
    monkeypatch.setattr(solo_networks, "solo_factories", dict)


def build_solo_encoder(name, method, small_stem, **kwargs):
    return solo_networks.build_solo_encoder(name, 224, method, small_stem, kwargs)


@pytest.mark.parametrize(("small", "kernel", "side"), [(True, (3, 3), 34), (False, (7, 7), 16)])
def test_the_stem_goes_by_the_data_set_not_by_the_size(small, kernel, side):
    network = build_solo_encoder("resnet18", "byol", small, zero_init_residual=True)
    assert network.conv1.kernel_size == kernel
    assert network.conv1(torch.randn(1, 3, 32, 32)).shape[-1] == side
    assert isinstance(network.maxpool, nn.Identity) == small
    assert not network.layer1[0].bn2.weight.any()


def test_our_encoders_are_built_for_the_size_that_solo_learns_factory_gets():
    assert build_solo_encoder("conv", "metamask", False).layers[0].stride == (2, 2)
    assert build_solo_encoder("conv", "metamask", False, image_size=64).layers[0].stride == (4, 4)
    assert build_encoder("conv", 64).layers[0].stride == (4, 4)


@pytest.mark.parametrize(("method", "heads"), [("simclr", 3), ("mocov3", 12), ("mae", 12)])
def test_a_vit_has_the_heads_of_its_method(method, heads):
    network = build_solo_encoder("vit_tiny", method, False, img_size=32)
    assert network.blocks[0].attn.num_heads == heads
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, network.num_features)


def test_solo_learns_own_factories_come_first(monkeypatch):
    asked = []

    def vit_tiny(method, **kwargs):
        asked.append((method, kwargs))
        return nn.Linear(1, 1)

    monkeypatch.setattr(solo_networks, "solo_factories", lambda: {"vit_tiny": vit_tiny})
    network = build_solo_encoder("vit_tiny", "dino", False, img_size=32)
    assert isinstance(network, nn.Linear) and asked == [("dino", {"img_size": 32})]


@pytest.mark.parametrize(
    ("name", "method", "kwargs", "message"),
    [
        ("vit_tiny", None, {}, "method must be given, as solo-learn's vit_tiny depends on it"),
        ("wide_resnet28w2", "simclr", {}, "wide_resnet28w2' must be importable"),
        ("convnext_tiny", "simclr", {"depth_of_field": 3}, "backbone.kwargs do not fit"),
        ("resnet18", "simclr", {"stem": "cifr"}, "did you mean 'cifar'"),
        ("resnet19", "simclr", {}, "did you mean 'resnet18'"),
    ],
)
def test_wrong_input(name, method, kwargs, message):
    with pytest.raises(UserError, match=message):
        build_solo_encoder(name, method, False, **kwargs)


def test_no_name_is_in_both_lists():
    assert not set(IN_TIMM) & set(NOT_IN_TIMM)
