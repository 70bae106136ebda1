"""NNCLR's loss and its look-up of neighbours against loops."""

import math

import pytest
import torch
import torch.nn.functional as F

from metamask_plugin.losses.nnclr import nearest_neighbours, nnclr_loss


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


def loop_oracle(neighbours, predictions, temperature, strata):
    terms = []
    for j in range(len(neighbours)):
        for k in range(len(neighbours)):
            if j == k:
                continue
            for i, anchor in enumerate(neighbours[j]):
                mass = sum(
                    math.exp(cosine(anchor, p) / temperature)
                    for other, p in enumerate(predictions[k])
                    if other != i
                )
                likelihoods = [math.exp(cosine(anchor, s) / temperature) for s in strata[k][i]]
                terms.append(-math.log(sum(p / (p + mass) for p in likelihoods) / len(likelihoods)))
    return sum(terms) / len(terms)


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    return [[torch.randn(4, 5) for _ in range(3)] for _ in range(2)]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_against_loops(tensors, views, temperature):
    neighbours, predictions = (side[:views] for side in tensors)
    ours = nnclr_loss(neighbours, predictions, temperature)
    expected = loop_oracle(neighbours, predictions, temperature, [p[:, None] for p in predictions])
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    strata = [torch.randn(4, 3, 5) for _ in range(views)]
    adjusted = nnclr_loss(neighbours, predictions, temperature, strata)
    expected = loop_oracle(neighbours, predictions, temperature, strata)
    assert adjusted.item() == pytest.approx(expected, rel=1e-12)


def test_is_cross_entropy_over_the_batch(tensors):
    (n1, n2, _), (p1, p2, _) = tensors
    labels = torch.arange(4)
    logits = [F.normalize(n, dim=1) @ F.normalize(p, dim=1).T / 0.1 for n, p in ((n1, p2), (n2, p1))]
    expected = sum(F.cross_entropy(matrix, labels) for matrix in logits) / 2
    torch.testing.assert_close(nnclr_loss([n1, n2], [p1, p2]), expected)


def test_order_and_length_do_not_count(tensors):
    neighbours, predictions = tensors
    loss = nnclr_loss(neighbours, predictions)
    torch.testing.assert_close(nnclr_loss(neighbours[::-1], predictions[::-1]), loss)
    order = torch.tensor([2, 0, 3, 1])
    moved = nnclr_loss([n[order] for n in neighbours], [p[order] for p in predictions])
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close(nnclr_loss([2 * n for n in neighbours], [5 * p for p in predictions]), loss)


def test_small_batches(double):
    z = torch.eye(2)
    expected = math.log(1 + math.exp(-1 / 0.1))
    assert nnclr_loss([z, z], [z, z]).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="needs a negative"):
        nnclr_loss([z[:1], z[:1]], [z[:1], z[:1]])


def test_neighbours_have_the_largest_cosine_and_the_smallest_distance(double):
    torch.manual_seed(0)
    z, support = torch.randn(6, 4), torch.randn(20, 4)
    found = nearest_neighbours(z, support)
    for row, ours in zip(z, found):
        assert torch.equal(ours, max(support, key=lambda entry: cosine(row, entry)))
    units = F.normalize(support, dim=1)
    closest = torch.cdist(F.normalize(z, dim=1), units).argmin(dim=1)
    torch.testing.assert_close(nearest_neighbours(z, units), units[closest])
    torch.testing.assert_close(nearest_neighbours(9 * z, support), found)


def test_neighbours_carry_no_gradient():
    z, support = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    assert not nearest_neighbours(z, support).requires_grad


def test_second_derivative(double):
    torch.manual_seed(1)
    neighbours = [torch.randn(3, 2), torch.randn(3, 2)]
    inputs = [torch.randn(3, 2), torch.randn(3, 2), torch.randn(3, 2, 2), torch.randn(3, 2, 2)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(
        lambda a, b, c, d: nnclr_loss(neighbours, [a, b], 0.5, [c, d]), inputs
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"neighbours": [torch.randn(4, 5)]}, "the same two or more views, got 1, 2 and 2"),
        ({"predictions": [torch.randn(4, 5)] * 3}, "got 2, 3 and 3"),
        ({"positives": [torch.randn(4, 5)]}, "got 2, 2 and 1"),
        ({"predictions": [torch.randn(3, 5)] * 2}, "positives \\(N, P\\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_wrong_input(change, message):
    views = [torch.randn(4, 5), torch.randn(4, 5)]
    with pytest.raises(ValueError, match=message):
        nnclr_loss(**{"neighbours": views, "predictions": views, **change})


@pytest.mark.parametrize("support", [torch.randn(0, 5), torch.randn(7, 4), torch.randn(5)])
def test_support_sets_that_do_not_fit(support):
    with pytest.raises(ValueError, match="support \\(K, P\\) with K >= 1"):
        nearest_neighbours(torch.randn(4, 5), support)


def test_a_bank_adds_negatives_to_every_anchor(double):
    torch.manual_seed(0)
    neighbours, predictions = ([torch.randn(4, 5) for _ in range(2)] for _ in range(2))
    bank = torch.randn(3, 5)

    def cosine(u, v):
        return float(u @ v / (u.norm() * v.norm()))

    terms = []
    for j, k in ((0, 1), (1, 0)):
        for i in range(4):
            e = [torch.tensor(cosine(neighbours[j][i], c) / 0.3).exp() for c in [*predictions[k], *bank]]
            terms.append(-(e[i] / sum(e)).log())
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(nnclr_loss(neighbours, predictions, 0.3, bank=bank), expected)
    torch.testing.assert_close(
        nnclr_loss(neighbours, predictions, 0.3, bank=bank[:0]), nnclr_loss(neighbours, predictions, 0.3)
    )
