"""Barlow Twins against loops, and its strata."""

from itertools import combinations

import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.tasks.barlow_twins import BarlowTwins


@pytest.fixture
def task(double):
    torch.manual_seed(0)
    return BarlowTwins(6, proj_hidden_dim=8, proj_output_dim=3, lamb=0.1, scale_loss=0.5)


def loop_oracle(z1, z2, lamb):
    """Eqs. (1) and (2), entry by entry, on projections with mean 0 over the batch."""
    z1, z2 = z1 - z1.mean(0), z2 - z2.mean(0)
    total = 0.0
    for i in range(z1.shape[1]):
        for j in range(z2.shape[1]):
            c = (z1[:, i] * z2[:, j]).sum() / (z1[:, i].pow(2).sum() * z2[:, j].pow(2).sum()).sqrt()
            total += (1 - c) ** 2 if i == j else lamb * c**2
    return total


def random_projections(views=2, images=7):
    return [torch.randn(images, 3) for _ in range(views)]


def test_is_the_sum_over_pairs_on_a_head_of_three_layers(task):
    feats = [torch.randn(7, 6) for _ in range(3)]
    z = [task.eval().project(h) for h in feats]
    expected = 0.5 * sum(loop_oracle(z1, z2, 0.1) for z1, z2 in combinations(z, 2))
    torch.testing.assert_close(task(feats).loss, expected)
    layers = [layer for layer in task.projector if isinstance(layer, nn.Linear)]
    assert [layer.out_features for layer in layers] == [8, 8, 3]
    assert task.projection_dim == 3


def test_invariances(task):
    z = random_projections()
    loss = task.loss(z)
    order = torch.randperm(7)
    torch.testing.assert_close(task.loss([view[order] for view in z]), loss)
    torch.testing.assert_close(task.loss(z[::-1]), loss)
    torch.testing.assert_close(task.loss([z[0] * torch.tensor([0.1, 2.0, 30.0]) + 5, z[1]]), loss)


def test_smallest_batches(task):
    two = [view.requires_grad_() for view in random_projections(images=2)]
    # every correlation of two images is 1 or -1
    diagonal = ((two[0][0] - two[0][1]) * (two[1][0] - two[1][1])).sign()
    expected = 0.5 * ((1 - diagonal).pow(2).sum() + 6 * 0.1)
    torch.testing.assert_close(task.loss(two), expected)
    one = [view[:1].detach().requires_grad_() for view in two]
    loss = task.loss(one)
    assert loss.item() == pytest.approx(0.5 * 3)
    assert all((g == 0).all() for g in torch.autograd.grad(loss, one))
    with pytest.raises(ValueError, match="two or more views, got 1"):
        task.loss(one[:1])


def test_identical_views_leave_the_off_diagonal(double):
    task, z = BarlowTwins(6, 8, 3, lamb=0.0), torch.randn(7, 3)
    assert task.loss([z, z]).item() == pytest.approx(0.0, abs=1e-12)


def test_icl_msr_is_the_mean_over_strata_summed_over_pairs(task):
    z = random_projections(views=3)
    weighted = [torch.randn(7, 2, 3).requires_grad_() for _ in z]
    ours = task.loss(z, None, weighted)
    terms = [
        loop_oracle(z[j], weighted[k][:, t], 0.1)
        for j in range(3)
        for k in range(3)
        for t in range(2)
        if j != k
    ]
    torch.testing.assert_close(ours, 0.5 * sum(terms) / 4)  # 12 terms: 3 pairs, both ways, 2 strata
    for gradient in torch.autograd.grad(ours, weighted):
        assert (gradient.abs().sum(dim=(0, 2)) > 0).all()  # every stratum
    unweighted = [view[:, None].repeat(1, 4, 1) for view in z]
    torch.testing.assert_close(task.loss(z, None, unweighted), task.loss(z))


def test_second_derivatives(task):
    views = [view.requires_grad_() for view in random_projections(images=4)]
    assert torch.autograd.gradgradcheck(lambda a, b: task.loss([a, b]), views)
    feats, a = [torch.randn(4, 6) for _ in range(2)], torch.rand(4, 2, 6).requires_grad_()
    weighted = [torch.stack([task.project(h * t) for t in a.unbind(1)], dim=1) for h in feats]
    loss = task.loss([task.project(h) for h in feats], None, weighted)
    first = torch.autograd.grad(loss, list(task.parameters()), create_graph=True)
    (mixed,) = torch.autograd.grad(sum(g.pow(2).sum() for g in first), a)
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize(("setting", "value"), [("lamb", -0.1), ("scale_loss", 0)])
def test_wrong_settings(setting, value):
    with pytest.raises(UserError, match=f"method_kwargs.task_kwargs.{setting} must be .* got {value}"):
        BarlowTwins(6, 8, 3, **{setting: value})
