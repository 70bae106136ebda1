"""CMC's loss against loops: negatives of the other view only."""

import math

import pytest
import torch

from metamask_plugin.losses.cmc import cmc_loss


def e(u, v, temperature):
    return math.exp(float(u @ v / (u.norm() * v.norm())) / temperature)


def loop_oracle(views, temperature, banks, strata):
    total = 0.0
    for anchor, other in ((0, 1), (1, 0)):
        images = len(views[anchor])
        for i in range(images):
            z = views[anchor][i]
            mass = sum(e(z, views[other][m], temperature) for m in range(images) if m != i)
            mass += sum(e(z, past, temperature) for past in banks[other])
            positives = [e(z, stratum, temperature) for stratum in strata[other][i]]
            total -= math.log(sum(p / (p + mass) for p in positives) / len(positives)) / images
    return total


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    views = [torch.randn(4, 5) for _ in range(2)]
    banks = [torch.randn(7, 5), torch.randn(3, 5)]
    return views, banks, [torch.randn(4, 3, 5) for _ in range(2)]


@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("banked", [True, False])
def test_against_loops(tensors, temperature, banked):
    views, banks, strata = tensors
    entries = banks if banked else [bank[:0] for bank in banks]
    own = [view[:, None] for view in views]
    ours = cmc_loss(views, temperature, banks if banked else None)
    assert ours.item() == pytest.approx(loop_oracle(views, temperature, entries, own), rel=1e-12)
    torch.testing.assert_close(cmc_loss(views, temperature, entries), ours)
    adjusted = cmc_loss(views, temperature, entries, strata)
    assert adjusted.item() == pytest.approx(loop_oracle(views, temperature, entries, strata), rel=1e-12)


def test_views_swap_with_their_banks_and_images_permute(tensors):
    views, banks, strata = tensors
    loss = cmc_loss(views, 0.2, banks, strata)
    torch.testing.assert_close(cmc_loss(views[::-1], 0.2, banks[::-1], strata[::-1]), loss)
    order = torch.tensor([2, 0, 3, 1])
    moved = cmc_loss([z[order] for z in views], 0.2, banks, [s[order] for s in strata])
    torch.testing.assert_close(moved, loss)
    scaled = cmc_loss([3 * z for z in views], 0.2, [0.1 * b for b in banks], [7 * s for s in strata])
    torch.testing.assert_close(scaled, loss)
    assert (cmc_loss(views, 0.2, banks[::-1], strata) - loss).abs() > 1e-3


def test_small_batches(double):
    z = torch.eye(2)
    # identical orthogonal views: cosine 1 with the positive, 0 with the one negative
    expected = 2 * math.log(1 + math.exp(-1 / 0.5))
    assert cmc_loss([z, z], 0.5).item() == pytest.approx(expected, rel=1e-12)
    with pytest.raises(ValueError, match="needs a negative"):
        cmc_loss([z[:1], z[:1]])
    banked = cmc_loss([z[:1], z[:1]], 0.5, [z[1:], z[1:]])
    assert banked.item() == pytest.approx(expected, rel=1e-12)


def test_second_derivative(double):
    torch.manual_seed(1)
    inputs = [torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2, 2), torch.randn(3, 2, 2)]
    inputs = [x.requires_grad_() for x in inputs]
    banks = [torch.randn(2, 2), torch.randn(2, 2)]
    assert torch.autograd.gradgradcheck(lambda a, b, c, d: cmc_loss([a, b], 0.5, banks, [c, d]), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"views": [torch.randn(4, 5)] * 3}, "views must be two tensors"),
        ({"views": [torch.randn(4, 5), torch.randn(3, 5)]}, "views must be two tensors"),
        ({"views": [torch.randn(4), torch.randn(4)]}, "views must be two tensors"),
        ({"banks": [torch.randn(4, 5)]}, "banks must be two"),
        ({"positives": [torch.randn(4, 5)] * 3}, "positives must be two"),
        ({"positives": [torch.randn(3, 5)] * 2}, "positives \\(N, P\\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_wrong_input(change, message):
    with pytest.raises(ValueError, match=message):
        cmc_loss(**{"views": [torch.randn(4, 5), torch.randn(4, 5)], **change})
