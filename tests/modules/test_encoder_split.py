import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.modules.encoder_split import EncoderSplit
from metamask_plugin.modules.encoders import build_encoder

CUT = [
    ("conv4", 32, 256),
    ("conv", 32, 256),
    ("fc", 32, 256),
    ("resnet18", 32, 512),
    ("resnet18", 64, 512),
    ("test_convnext", 32, 64),
    ("test_resnet", 32, 96),
]


@pytest.mark.parametrize(("name", "size", "channels"), CUT)
def test_the_parts_in_a_row_are_the_encoder(name, size, channels):
    torch.manual_seed(0)
    encoder = build_encoder(name, size)
    split = EncoderSplit(encoder, size)
    x = torch.randn(4, 3, size, size)
    feature_map = split.front(x)
    assert feature_map.dim() == 4 and feature_map.shape[1] == split.channels == channels
    encoder.eval()
    torch.testing.assert_close(split.tail(split.front(x)), encoder(x))


@pytest.mark.parametrize(("name", "size", "channels"), CUT)
def test_every_parameter_is_on_one_side(name, size, channels):
    encoder = build_encoder(name, size)
    split = EncoderSplit(encoder, size)
    every = {f"network.{key}" for key, _ in encoder.named_parameters()}
    assert split.front_names | split.tail_names == every
    assert not split.front_names & split.tail_names
    x = torch.randn(4, 3, size, size)
    split.tail(split.front(x).detach()).sum().backward() if split.tail_names else None
    assert split.tail_names == {
        f"network.{key}" for key, p in encoder.named_parameters() if p.grad is not None
    }


def test_what_lies_behind_the_map():
    assert EncoderSplit(build_encoder("resnet18", 32), 32).tail_names == set()
    fc = EncoderSplit(build_encoder("fc", 32), 32).tail_names
    assert fc and all(name.startswith("network.fc.") for name in fc)
    assert EncoderSplit(build_encoder("test_convnext", 32), 32).tail_names  # its norm


def test_looking_leaves_no_trace():
    encoder = build_encoder("resnet18", 16)
    encoder.layer1.eval()
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    rng = torch.get_rng_state()
    EncoderSplit(encoder, 16)
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)
    assert encoder.training and encoder.layer2.training and not encoder.layer1.training
    assert all(p.grad is None for p in encoder.parameters())


@pytest.mark.parametrize("name", ["test_vit", "swin_tiny_patch4_window7_224"])
def test_transformers_have_no_map_of_channels(name):
    size = 32 if name == "test_vit" else 224
    with pytest.raises(UserError, match="level=feature_map needs an encoder with a feature map"):
        EncoderSplit(build_encoder(name, size), size)


def test_an_encoder_that_cannot_be_cut():
    with pytest.raises(UserError, match="got Sequential; set method_kwargs.level=features"):
        EncoderSplit(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), 2)
