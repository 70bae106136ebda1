"""SwAV: what its codes are computed with, and what changes when."""

import pytest
import torch
import torch.nn.functional as F

from metamask_plugin.errors import UserError
from metamask_plugin.losses.sinkhorn import sinkhorn_codes
from metamask_plugin.losses.swav import multi_crop_loss
from metamask_plugin.tasks.swav import SwAV

SMALL = {"proj_hidden_dim": 8, "proj_output_dim": 4, "num_prototypes": 5, "queue_size": 6}


@pytest.fixture
def task(double):
    torch.manual_seed(0)
    return SwAV(6, **SMALL)


def random_projections(views=2, images=3):
    return [torch.randn(images, 4) for _ in range(views)]


def by_hand(task, projections, large=2, past=(None, None), weighted=None):
    """Eq. (6) from unit vectors and codes, put together here."""
    c = task.prototypes.weight / task.prototypes.weight.norm(dim=1, keepdim=True)

    def scores(z):
        return z / z.norm(dim=-1, keepdim=True) @ c.T

    codes = []
    for crop in range(large):
        joint = [projections[crop]] if past[crop % 2] is None else [projections[crop], past[crop % 2]]
        codes.append(sinkhorn_codes(scores(torch.cat(joint)), 0.05, 3)[: len(projections[0])])
    return multi_crop_loss(codes, [scores(z) for z in weighted or projections], 0.1)


def snapshot(task):
    return {name: value.clone() for name, value in task.state_dict().items()}


def test_is_the_swapped_prediction_of_the_projections(task):
    feats = [torch.randn(7, 6) for _ in range(2)]
    projections = [task.project(h) for h in feats]
    assert projections[0].shape == (7, 4)
    assert task.projection_dim == 4
    torch.testing.assert_close(task.eval()(feats).loss, by_hand(task, [task.project(h) for h in feats]))


def test_codes_are_of_large_crops_and_predictions_of_all(task):
    projections = random_projections(views=4)
    torch.testing.assert_close(task.loss(projections), by_hand(task, projections, large=4))
    task.large_views = 2
    torch.testing.assert_close(task.loss(projections), by_hand(task, projections, large=2))
    small = [z.requires_grad_() for z in projections[2:]]
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(task.loss([*projections[:2], *small]), small))


def test_lengths_and_order_do_not_count(task):
    projections = random_projections(images=5)
    loss = task.loss(projections)
    order = torch.randperm(5)
    torch.testing.assert_close(task.loss([z[order] for z in projections]), loss)
    torch.testing.assert_close(task.loss(projections[::-1]), loss)
    torch.testing.assert_close(task.loss([3 * projections[0], 0.1 * projections[1]]), loss)
    task.prototypes.weight.data *= torch.rand(5, 1) + 1
    torch.testing.assert_close(task.loss(projections), loss)


def test_codes_are_constants_for_the_gradient_but_follow_displaced_weights(task):
    projections = [z.requires_grad_() for z in random_projections()]
    with torch.no_grad():
        codes = task._codes(task._scores(projections))
    parameters = [*projections, task.prototypes.weight]
    ours = torch.autograd.grad(task.loss(projections), parameters)
    fixed = torch.autograd.grad(multi_crop_loss(codes, task._scores(projections), 0.1), parameters)
    torch.testing.assert_close(ours, fixed)

    step = 1e-5 * torch.randn(3, 4)
    forth, back = (task.loss([projections[0] + sign * step, projections[1]]) for sign in (1, -1))
    assert (forth - back).item() != pytest.approx(2 * (ours[0] * step).sum().item(), rel=1e-2)


def test_prototypes_have_unit_length_at_the_start_and_after_each_step(task):
    def lengths():
        return task.prototypes.weight.norm(dim=1)

    torch.testing.assert_close(lengths(), torch.ones(5))
    task.prototypes.weight.data += 0.5
    projections = random_projections()
    before = task.loss(projections)
    task.after_step(torch.nn.Identity(), 0.5)
    torch.testing.assert_close(lengths(), torch.ones(5))
    torch.testing.assert_close(task.loss(projections), before)  # normalised in the loss anyway
    assert task.state_dict()["steps"] == 1


def test_queue_takes_in_the_large_crops_once_a_batch(task):
    task.large_views = 2
    first, second = random_projections(views=3), random_projections(views=3)
    task.after_batch(first, None)
    task.after_batch(second, None)
    for crop, queue in enumerate(task.queues):
        expected = F.normalize(torch.cat([first[crop], second[crop]]), dim=1)
        torch.testing.assert_close(queue.entries, expected)
    assert task.queued == 6
    task.after_batch(first, None)
    assert task.queued == 6


def test_queue_is_used_when_full_and_started_and_for_codes_alone(double):
    torch.manual_seed(0)
    task, projections = SwAV(6, **SMALL, queue_start=2), random_projections(views=3)
    without = by_hand(task, projections, large=3)
    past = [torch.cat(pair) for pair in zip(random_projections(), random_projections())]
    for half in (0, 3):
        torch.testing.assert_close(task.loss(projections), without)  # not full
        task.after_batch([z[half : half + 3] for z in past], None)
    for _ in range(2):
        torch.testing.assert_close(task.loss(projections), without)  # full, but two steps too early
        task.after_step(torch.nn.Identity(), 0.0)
    with_queue = by_hand(task, projections, large=3, past=past)  # the third large crop takes the first queue
    torch.testing.assert_close(task.loss(projections), with_queue)
    assert with_queue.item() != pytest.approx(without.item(), rel=1e-3)
    resumed = SwAV(6, **SMALL, queue_start=2)
    resumed.load_state_dict(task.state_dict())
    torch.testing.assert_close(resumed.loss(projections), with_queue)


def test_without_a_queue(double):
    task = SwAV(6, **{**SMALL, "queue_size": 0})
    projections = random_projections()
    loss = task.loss(projections)
    task.after_batch(projections, None)
    torch.testing.assert_close(task.loss(projections), loss)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.1),
    ],
)
def test_prototypes_freeze_for_some_steps(double, optimizer):
    torch.manual_seed(0)
    task = SwAV(6, **SMALL, freeze_prototypes_steps=2).train()
    optimizer, start = optimizer(task.parameters()), task.prototypes.weight.clone()
    for step in range(3):
        loss = task([torch.randn(4, 6) for _ in range(2)]).loss
        optimizer.zero_grad()
        loss.backward()
        assert task.prototypes.weight.grad.any() == (step == 2)
        optimizer.step()
        task.after_step(torch.nn.Identity(), 0.0)
        if step < 2:
            torch.testing.assert_close(task.prototypes.weight, start)
    assert not torch.allclose(task.prototypes.weight, start)


def test_icl_msr_predicts_the_code_of_the_unweighted_view(task):
    task.large_views = 2
    projections = random_projections(views=3)
    weighted = [torch.randn(3, 4, 4).requires_grad_() for _ in projections]
    ours = task.loss(projections, None, weighted)
    torch.testing.assert_close(ours, by_hand(task, projections, weighted=weighted))
    for gradient in torch.autograd.grad(ours, weighted):
        assert (gradient.abs().sum(dim=(0, 2)) > 0).all()  # every stratum
    unweighted = [z[:, None].repeat(1, 4, 1) for z in projections]
    plain = task.loss(projections, None, unweighted)
    torch.testing.assert_close(plain, task.loss(projections))


def test_icl_msr_has_a_mixed_second_derivative(task):
    feats, a = [torch.randn(4, 6) for _ in range(2)], torch.rand(4, 2, 6).requires_grad_()
    weighted = [torch.stack([task.project(h * t) for t in a.unbind(1)], dim=1) for h in feats]
    loss = task.loss([task.project(h) for h in feats], None, weighted)
    first = torch.autograd.grad(loss, list(task.parameters()), create_graph=True)
    (mixed,) = torch.autograd.grad(sum(g.pow(2).sum() for g in first), a)
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_prototypes", 1),
        ("temperature", 0),
        ("epsilon", 0),
        ("sinkhorn_iterations", 0),
        ("queue_size", -1),
        ("queue_start", -1),
        ("freeze_prototypes_steps", -1),
    ],
)
def test_wrong_settings(setting, value):
    with pytest.raises(UserError, match=f"method_kwargs.task_kwargs.{setting} must be .* got {value}"):
        SwAV(6, **{**SMALL, setting: value})
