"""Which pixels the features depend on."""

import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.modules.encoder_reach import (
    check_reach,
    patch_size,
    unseen_beyond_tolerance,
    unseen_border,
    without_zeros,
)
from metamask_plugin.modules.encoders import build_encoder


class Window(nn.Module):
    """Sees rows ``top`` to ``bottom`` and columns ``left`` to ``right`` alone."""

    def __init__(self, top, bottom, left, right):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.rows, self.columns = slice(top, bottom), slice(left, right)

    def forward(self, x):
        return self.weight * x[:, :, self.rows, self.columns].mean(dim=(2, 3))


@pytest.mark.parametrize(
    ("window", "unseen"), [((0, 32, 0, 32), 0), ((0, 30, 0, 32), 2), ((5, 32, 0, 29), 5), ((1, 31, 7, 32), 7)]
)
def test_the_widest_border_is_measured_on_every_side(window, unseen):
    assert unseen_border(Window(*window), 32) == unseen


@pytest.mark.parametrize("size", [32, 33, 40, 64, 75])
@pytest.mark.parametrize("name", ["conv4", "resnet18", "regnetx_002"])
def test_networks_with_padding_see_the_whole_image(name, size):
    assert unseen_border(without_zeros(build_encoder(name, size)), size) == 0


@pytest.mark.parametrize(
    ("name", "size", "patch", "unseen"),
    [
        ("vit_tiny_patch16_224", 28, 16, 12),
        ("vit_tiny_patch16_224", 64, 16, 0),
        ("mixer_s32_224", 48, 32, 16),
        ("swin_tiny_patch4_window7_224", 30, 4, 2),
        ("swin_tiny_patch4_window7_224", 36, 4, 0),
    ],
)
def test_transformers_do_not_see_what_no_whole_patch_holds(name, size, patch, unseen):
    encoder = without_zeros(build_encoder(name, size, **({"depth": 2} if name.startswith("vit") else {})))
    assert (patch_size(encoder), unseen_border(encoder, size)) == (patch, unseen)
    assert unseen_beyond_tolerance(encoder, size, unseen) == (unseen > 0)
    if unseen:
        with pytest.raises(UserError, match=f"crop_size must be a multiple of the patch {patch}, got {size}"):
            check_reach(encoder, size, "crop_size")


def test_a_padding_transformer_may_have_any_size():
    encoder = build_encoder("vit_tiny_patch16_224", 28, depth=1, dynamic_img_size=True, dynamic_img_pad=True)
    assert unseen_border(encoder, 28) == 0
    check_reach(encoder, 28, "crop_size")


def test_strided_convolutions_may_drop_some_pixels():
    encoder = build_encoder("conv", 84)
    unseen = unseen_border(encoder, 84)
    assert 0 < unseen < 8.4
    check_reach(encoder, 84, "crop_size")


def test_the_encoder_and_the_random_state_stay_as_they_were():
    encoder = build_encoder("resnet18", 32).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    state = torch.get_rng_state()
    unseen_border(encoder, 32)
    assert torch.equal(state, torch.get_rng_state()) and encoder.training
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_of_a_constant_encoder_nothing_is_said():
    encoder = Window(0, 4, 0, 4)
    nn.init.zeros_(encoder.weight)
    assert unseen_border(encoder, 32) == 0
    assert unseen_border(without_zeros(encoder), 32) == 28
