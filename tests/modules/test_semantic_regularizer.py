import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.modules.semantic_regularizer import SemanticRegularizer, weight_statistics


def build(n=6, channels=10, activation="sigmoid", trunk="conv4", **kwargs):
    torch.manual_seed(0)
    return SemanticRegularizer(build_encoder(trunk, 32, **kwargs), channels, n, activation)


@pytest.mark.parametrize(("trunk", "kwargs"), [("conv4", {"norm": "group"}), ("test_resnet", {})])
@pytest.mark.parametrize("n", [1, 14])
def test_shape(trunk, kwargs, n):
    weights = build(n, trunk=trunk, **kwargs)(torch.randn(3, 3, 32, 32))
    assert weights.shape == (3, n, 10)
    assert weights.min() > 0 and weights.max() < 1


def test_another_image_size_is_fine():
    assert build()(torch.randn(2, 3, 48, 48)).shape == (2, 6, 10)


def test_activations():
    x = torch.randn(8, 3, 32, 32)
    assert build(activation="none")(x).min() < 0
    softplus = build(activation="softplus")(x)
    assert softplus.min() > 0
    torch.testing.assert_close(softplus, torch.nn.functional.softplus(build(activation="none")(x)))


def test_every_stratum_starts_near_the_whole_representation():
    weights = build(norm="group")(torch.randn(16, 3, 32, 32))
    assert (weights - 0.5).abs().max() < 0.4
    assert weight_statistics(weights)["msr_overlap"] > 0.9


def test_nothing_in_it_trains_by_itself():
    assert not any(p.requires_grad for p in build().parameters())


def test_with_group_norm_an_image_does_not_depend_on_its_batch():
    regularizer, x = build(norm="group"), torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(regularizer(x)[:1], regularizer(x[:1]))


def test_statistics():
    disjoint = torch.eye(3).expand(5, -1, -1)
    found = weight_statistics(disjoint)
    assert found["msr_overlap"] == 0 and found["msr_image_std"] == 0
    assert found["msr_mean"].item() == pytest.approx(1 / 3)
    assert weight_statistics(torch.ones(5, 3, 4))["msr_overlap"].item() == pytest.approx(1.0)
    torch.manual_seed(0)
    assert weight_statistics(torch.rand(5, 3, 4))["msr_image_std"] > 0
    assert weight_statistics(torch.rand(5, 1, 4))["msr_overlap"].abs() < 1e-6  # there is no second vector


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"n": 0}, "regularizer.n must be an integer >= 1, got 0"),
        ({"activation": "sigmod"}, "did you mean 'sigmoid'"),
        ({"width": 12, "norm": "group"}, "conv4's width must be a multiple of 8"),
        ({"norm": "layer"}, "conv4's norm must be one of"),
    ],
)
def test_settings_that_cannot_be(kwargs, message):
    with pytest.raises(UserError, match=message):
        build(**kwargs)
