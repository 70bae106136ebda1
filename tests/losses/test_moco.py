"""MoCo's loss against loops: queries of every view, keys of some, negatives from the queue alone."""

import math

import pytest
import torch

from metamask_plugin.losses.moco import moco_loss


def e(u, v, temperature):
    return math.exp(float(u @ v / (u.norm() * v.norm())) / temperature)


def loop_oracle(queries, strata, queue, temperature):
    terms = []
    for j, view in enumerate(queries):
        for k, keys in enumerate(strata):
            if j == k:
                continue
            for q, positives in zip(view, keys):
                mass = sum(e(q, past, temperature) for past in queue)
                likelihoods = [e(q, key, temperature) for key in positives]
                terms.append(-math.log(sum(p / (p + mass) for p in likelihoods) / len(likelihoods)))
    return sum(terms) / len(terms)


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    queries = [torch.randn(4, 5) for _ in range(4)]
    return queries, [torch.randn(4, 5) for _ in range(2)], torch.randn(7, 5)


@pytest.mark.parametrize("views", [2, 4])  # 4: two small crops, which have no keys
@pytest.mark.parametrize("temperature", [0.07, 0.2])
def test_against_loops(tensors, views, temperature):
    queries, keys, queue = tensors
    ours = moco_loss(queries[:views], keys, queue, temperature)
    expected = loop_oracle(queries[:views], [k[:, None] for k in keys], queue, temperature)
    assert ours.item() == pytest.approx(expected, rel=1e-12)
    strata = [torch.randn(4, 3, 5) for _ in keys]
    adjusted = moco_loss(queries[:views], strata, queue, temperature)
    expected = loop_oracle(queries[:views], strata, queue, temperature)
    assert adjusted.item() == pytest.approx(expected, rel=1e-12)


def test_order_and_length_do_not_count(tensors):
    (q1, q2, *_), (k1, k2), queue = tensors
    loss = moco_loss([q1, q2], [k1, k2], queue)
    torch.testing.assert_close(moco_loss([q2, q1], [k2, k1], queue), loss)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(moco_loss([q1[order], q2[order]], [k1[order], k2[order]], queue), loss)
    torch.testing.assert_close(moco_loss([q1, q2], [k1, k2], queue.flip(0)), loss)
    torch.testing.assert_close(moco_loss([3 * q1, q2], [k1, 0.2 * k2], 7 * queue), loss)


def test_images_are_independent(tensors):
    queries, keys, queue = tensors
    alone = [
        moco_loss([q[i : i + 1] for q in queries], [k[i : i + 1] for k in keys], queue) for i in range(4)
    ]
    torch.testing.assert_close(torch.stack(alone).mean(), moco_loss(queries, keys, queue))


def test_identical_views_and_an_orthogonal_queue(double):
    z, queue = torch.eye(6)[:2], torch.eye(6)[2:5]
    expected = math.log(1 + 3 * math.exp(-1 / 0.2))
    assert moco_loss([z, z], [z, z], queue).item() == pytest.approx(expected, rel=1e-12)


def test_second_derivative(double):
    torch.manual_seed(1)
    queue = torch.randn(3, 2)
    inputs = [torch.randn(2, 2), torch.randn(2, 2), torch.randn(2, 2, 2), torch.randn(2, 2, 2)]
    inputs = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradgradcheck(lambda a, b, c, d: moco_loss([a, b], [c, d], queue), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": [torch.randn(4, 5)]}, "moco_loss: queries must be two or more"),
        ({"keys": []}, "keys at most as many"),
        ({"keys": [torch.randn(4, 5)] * 3}, "keys at most as many"),
        ({"keys": [torch.randn(3, 5)] * 2}, "keys at most as many"),
        ({"queue": torch.randn(0, 5)}, "needs a negative"),
        ({"queue": torch.randn(7, 4)}, "negatives \\(K, P\\)"),
        ({"temperature": -1.0}, "temperature must be > 0"),
    ],
)
def test_wrong_input(change, message):
    views = [torch.randn(4, 5), torch.randn(4, 5)]
    with pytest.raises(ValueError, match=message):
        moco_loss(**{"queries": views, "keys": views, "queue": torch.randn(7, 5), **change})
