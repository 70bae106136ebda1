"""The shared contrastive term against loops."""

import math

import pytest
import torch

from metamask_plugin.losses import contrastive_loss, nt_xent_loss
from metamask_plugin.losses.contrastive import same_image


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


def loop_oracle(anchors, strata, negatives, temperature, excluded):
    total = 0.0
    for i, anchor in enumerate(anchors):
        mass = sum(
            math.exp(cosine(anchor, negative) / temperature)
            for k, negative in enumerate(negatives)
            if not excluded[i, k]
        )
        likelihood = 0.0
        for positive in strata[i]:
            e = math.exp(cosine(anchor, positive) / temperature)
            likelihood += e / (e + mass) / len(strata[i])
        total -= math.log(likelihood)
    return total / len(anchors)


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    return torch.randn(4, 5), torch.randn(4, 3, 5), torch.randn(7, 5), torch.rand(4, 7) < 0.3


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_against_loops(tensors, temperature):
    anchors, strata, negatives, excluded = tensors
    ours = contrastive_loss(anchors, strata, negatives, temperature, excluded)
    assert ours.item() == pytest.approx(loop_oracle(*tensors[:3], temperature, excluded), rel=1e-12)


def test_one_positive_is_one_stratum(tensors):
    anchors, strata, negatives, _ = tensors
    one = contrastive_loss(anchors, strata[:, 0], negatives)
    torch.testing.assert_close(one, contrastive_loss(anchors, strata[:, :1], negatives))
    repeated = strata[:, :1].repeat(1, 6, 1)
    torch.testing.assert_close(one, contrastive_loss(anchors, repeated, negatives))


def test_two_views_and_a_bank_are_nt_xent(double):
    torch.manual_seed(0)
    z1, z2, bank = torch.randn(6, 5), torch.randn(6, 5), torch.randn(9, 5)
    candidates, own = torch.cat([z1, z2, bank]), same_image(6, 2, 9)
    both = (
        contrastive_loss(z1, z2, candidates, 0.2, own) + contrastive_loss(z2, z1, candidates, 0.2, own)
    ) / 2
    torch.testing.assert_close(both, nt_xent_loss([z1, z2], 0.2, bank=bank))
    empty = nt_xent_loss([z1, z2], 0.2, bank=bank[:0])
    torch.testing.assert_close(empty, nt_xent_loss([z1, z2], 0.2))


def test_same_image_marks_every_view_and_no_bank_entry():
    own = same_image(3, 2, 4)
    assert own.shape == (3, 10)
    assert own.nonzero().tolist() == [[0, 0], [0, 3], [1, 1], [1, 4], [2, 2], [2, 5]]


@pytest.mark.parametrize("temperature", [0.01, 0.07])
def test_second_derivatives_are_finite_in_float32_at_small_temperatures(temperature):
    torch.manual_seed(0)
    z = torch.randn(8, 5, requires_grad=True)
    loss = contrastive_loss(z, z.detach() + 0.1, torch.randn(20, 5), temperature)
    (gradient,) = torch.autograd.grad(loss, z, create_graph=True)
    (second,) = torch.autograd.grad(gradient.pow(2).sum(), z)
    assert torch.isfinite(second).all() and second.abs().max() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positives": torch.randn(3, 5)}, "positives \\(N, P\\)"),
        ({"negatives": torch.randn(7, 4)}, "must be"),
        ({"temperature": 0.0}, "temperature must be > 0"),
        ({"negatives": torch.randn(0, 5)}, "needs a negative"),
        ({"excluded": torch.ones(4, 7, dtype=torch.bool)}, "needs a negative"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"anchors": torch.randn(4, 5), "positives": torch.randn(4, 5), "negatives": torch.randn(7, 5)}
    with pytest.raises(ValueError, match=message):
        contrastive_loss(**{**arguments, **change})
