"""timm's models as encoders: the width of their features, whatever stands behind the pooling."""

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.modules.encoders import build_encoder

WITH_A_HIDDEN_LAYER = [
    "mobilenetv3_small_050",
    "mobilenetv4_conv_small_035",
    "ghostnet_050",
    "ghostnetv2_100",
    "ghostnetv3_050",
    "lcnet_035",
    "hardcorenas_a",
    "efficientvit_b0",
    "hgnetv2_b0",
    "inception_next_atto",
    "mambaout_femto",
    "fasternet_t0",
    pytest.param("vgg11", marks=pytest.mark.slow),  # 100 million weights
]
"""Families in which timm's ``num_features`` is not the width of what the model returns."""


@pytest.mark.fault(
    "encoders",
    source="huggingface/pytorch-image-models#2228, huggingface/pytorch-image-models#2290, "
    "huggingface/pytorch-image-models#1406",
)
@pytest.mark.parametrize("name", WITH_A_HIDDEN_LAYER)
def test_the_width_is_that_of_the_output(name):
    encoder = build_encoder(name, 64)
    assert encoder.training
    with torch.no_grad():
        assert encoder.eval()(torch.zeros(2, 3, 64, 64)).shape == (2, encoder.num_features)


def test_a_width_of_timms_own_stays():
    assert build_encoder("vit_tiny_patch16_224", 32, depth=1).num_features == 192


def test_measuring_draws_no_random_numbers():
    torch.manual_seed(0)
    build_encoder("mobilenetv3_small_050", 32)
    ours = torch.rand(3)
    torch.manual_seed(0)
    __import__("timm").create_model("mobilenetv3_small_050", num_classes=0)
    assert torch.equal(ours, torch.rand(3))


def test_a_classifier_is_no_encoder():
    with pytest.raises(UserError, match="backbone.kwargs.num_classes must be 0"):
        build_encoder("mobilenetv3_small_050", 32, num_classes=10)
