"""The relation loss against loops."""

import math

import pytest
import torch

from metamask_plugin.losses.ressl import relation_loss


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


def relation(z, queue, temperature):
    e = [math.exp(cosine(z, q) / temperature) for q in queue]
    return [x / sum(e) for x in e]


def loop_oracle(anchors, targets, queue, online, target):
    total = 0.0
    for z, z_target in zip(anchors, targets):
        predicted, wanted = relation(z, queue, online), relation(z_target, queue, target)
        total -= sum(w * math.log(p) for w, p in zip(wanted, predicted))
    return total / len(anchors)


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    return torch.randn(4, 5), torch.randn(4, 5), torch.randn(7, 5)


@pytest.mark.parametrize("temperatures", [(0.1, 0.04), (0.5, 0.3)])
def test_against_loops(tensors, temperatures):
    ours = relation_loss(*tensors, *temperatures)
    assert ours.item() == pytest.approx(loop_oracle(*tensors, *temperatures), rel=1e-12)


def test_lengths_and_orders_do_not_count(tensors):
    anchors, targets, queue = tensors
    images, entries = torch.randperm(4), torch.randperm(7)
    other = relation_loss(3 * anchors[images], targets[images] / 5, 2 * queue[entries])
    torch.testing.assert_close(other, relation_loss(*tensors))


def test_entropy_is_the_least_and_reached_by_identical_views(tensors):
    anchors, targets, queue = tensors
    relations = torch.tensor([relation(z, queue, 0.3) for z in targets])
    entropy = -(relations * relations.log()).sum(dim=1).mean()
    torch.testing.assert_close(relation_loss(targets, targets, queue, 0.3, 0.3), entropy)
    assert relation_loss(anchors, targets, queue, 0.3, 0.3) > entropy


@pytest.mark.parametrize("images", [1, 2])
def test_an_anchor_equally_near_to_all_costs_log_k(double, images):
    queue, anchor = torch.eye(4)[:3], torch.eye(4)[3:]
    loss = relation_loss(anchor.repeat(images, 1), torch.randn(images, 4), queue)
    assert loss.item() == pytest.approx(math.log(3))


def test_to_one_sample_there_is_one_relation(tensors):
    anchors, targets, queue = tensors
    assert relation_loss(anchors, targets, queue[:1]).item() == 0


def test_small_temperatures_stay_finite(tensors):
    inputs = [tensor.requires_grad_() for tensor in tensors[:2]]
    loss = relation_loss(*inputs, tensors[2], 1e-3, 1e-3)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss, inputs))


def test_gradients_go_to_both_sides(tensors):
    inputs = [tensor.requires_grad_() for tensor in tensors[:2]]
    loss = relation_loss(*inputs, tensors[2])
    assert all(gradient.any() for gradient in torch.autograd.grad(loss, inputs))
    assert torch.autograd.gradgradcheck(lambda z, t: relation_loss(z, t, tensors[2], 0.5, 0.3), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.randn(3, 5)}, r"one shape \(N, P\), queue \(K, P\), none empty, got \(4, 5\)"),
        ({"queue": torch.randn(7, 4)}, "none empty"),
        ({"queue": torch.randn(0, 5)}, "none empty"),
        ({"anchors": torch.randn(0, 5), "targets": torch.randn(0, 5)}, "none empty"),
        ({"anchors": torch.randn(4), "targets": torch.randn(4)}, "none empty"),
        ({"online_temperature": 0.0}, "online_temperature must be > 0, got 0.0"),
        ({"target_temperature": -1.0}, "target_temperature must be > 0, got -1.0"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"anchors": torch.randn(4, 5), "targets": torch.randn(4, 5), "queue": torch.randn(7, 5)}
    with pytest.raises(ValueError, match=f"relation_loss: .*{message}"):
        relation_loss(**{**arguments, **change})
