"""W-MSE: slices, small batches, strata."""

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.losses.whitening import random_slices, whitened_mse_loss
from metamask_plugin.tasks.wmse import WMSE


@pytest.fixture
def task(double):
    torch.manual_seed(0)
    return WMSE(6, proj_hidden_dim=8, proj_output_dim=3, whitening_size=5, whitening_iterations=2)


def random_projections(views=2, images=11):
    return [torch.randn(images, 3) for _ in range(views)]


def test_is_w_mse_of_the_projections_in_random_slices(task):
    feats = [torch.randn(11, 6) for _ in range(3)]
    task.eval()
    torch.manual_seed(1)
    ours = task(feats).loss
    torch.manual_seed(1)
    partitions = random_slices(11, 5, 2)
    assert [[len(index) for index in slices] for slices in partitions] == [[6, 5], [6, 5]]
    torch.testing.assert_close(
        ours, whitened_mse_loss([task.project(h) for h in feats], partitions, eps=1e-3)
    )
    assert task.project(feats[0]).shape == (11, 3)
    assert task.projection_dim == 3


def test_loss_is_a_function_of_the_random_state(task):
    projections = random_projections()
    losses = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        losses.append(task.loss(projections).item())
    assert losses[0] == losses[1] != losses[2]


def test_fewer_images_than_dimensions_run(double):
    torch.manual_seed(0)
    task = WMSE(6, proj_hidden_dim=8, proj_output_dim=16).train()  # whitening_size 128
    for images in (2, 8):
        loss = task([torch.randn(images, 6) for _ in range(2)]).loss
        gradients = torch.autograd.grad(loss, list(task.parameters()))
        assert 0 <= loss <= 4
        assert all(g.isfinite().all() for g in gradients)
    with pytest.raises(ValueError, match="2 images or more"):
        task.loss([torch.randn(1, 16)] * 2)


def test_icl_msr_is_the_mean_over_strata_and_ordered_pairs(task):
    projections = random_projections(views=3)
    weighted = [torch.randn(11, 2, 3).requires_grad_() for _ in projections]
    torch.manual_seed(1)
    ours = task.loss(projections, None, weighted)
    torch.manual_seed(1)
    partitions = random_slices(11, 5, 2)
    terms = [
        whitened_mse_loss([projections[j], weighted[k][:, t]], partitions, 1e-3)
        for j in range(3)
        for k in range(3)
        for t in range(2)
        if j != k
    ]
    torch.testing.assert_close(ours, torch.stack(terms).mean())
    for gradient in torch.autograd.grad(ours, weighted):
        assert (gradient.abs().sum(dim=(0, 2)) > 0).all()  # every stratum


def test_icl_msr_of_unweighted_strata_is_the_loss(task):
    projections = random_projections(views=3)
    torch.manual_seed(1)
    plain = task.loss(projections)
    torch.manual_seed(1)
    strata = [z[:, None].repeat(1, 4, 1) for z in projections]
    torch.testing.assert_close(task.loss(projections, None, strata), plain)


def test_icl_msr_has_a_mixed_second_derivative(task):
    feats, a = [torch.randn(6, 6) for _ in range(2)], torch.rand(6, 2, 6).requires_grad_()
    weighted = [torch.stack([task.project(h * t) for t in a.unbind(1)], dim=1) for h in feats]
    loss = task.loss([task.project(h) for h in feats], None, weighted)
    first = torch.autograd.grad(loss, list(task.parameters()), create_graph=True)
    (mixed,) = torch.autograd.grad(sum(g.pow(2).sum() for g in first), a)
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


@pytest.mark.parametrize(
    ("setting", "value"), [("whitening_size", 1), ("whitening_iterations", 0), ("eps", 1.0), ("eps", -0.1)]
)
def test_wrong_settings(setting, value):
    with pytest.raises(UserError, match=f"method_kwargs.task_kwargs.{setting} must be .* got {value}"):
        WMSE(6, **{setting: value})
