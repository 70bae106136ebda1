"""Whitening and W-MSE against NumPy, and the edges of small batches."""

import math

import numpy as np
import pytest
import torch

from metamask_plugin.losses.whitening import random_slices, whiten, whitened_mse_loss


def numpy_whitened(z, eps):
    """With an inverse instead of a triangular solve, and NumPy's covariance."""
    z = z.detach().numpy()
    covariance = (1 - eps) * np.cov(z, rowvar=False) + eps * np.eye(z.shape[1])
    return (z - z.mean(0)) @ np.linalg.inv(np.linalg.cholesky(covariance)).T


def loop_oracle(views, slices, eps):
    """The squared distance of normalised vectors, image by image, pair by pair of views."""
    total, terms = 0.0, 0
    for j in range(len(views)):
        for k in range(j):
            for index in slices:
                for a, b in zip(numpy_whitened(views[j][index], eps), numpy_whitened(views[k][index], eps)):
                    difference = a / math.sqrt((a**2).sum()) - b / math.sqrt((b**2).sum())
                    total, terms = total + (difference**2).sum(), terms + 1
    return total / terms


def random_views(views=2, images=12, dim=3):
    torch.manual_seed(0)
    mixing = torch.randn(dim, dim, dtype=torch.float64)
    return [torch.randn(images, dim, dtype=torch.float64) @ mixing + 2 for _ in range(views)]


def test_whitened_has_mean_zero_and_covariance_one():
    whitened = whiten(random_views(images=50)[0], eps=0.0)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(whitened.T.cov(), torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("eps", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("views", [2, 3])
def test_against_loops(views, eps):
    z = random_views(views)
    slices = [torch.tensor([1, 5, 2, 7, 0]), torch.tensor([3, 4, 6, 8, 9, 10, 11])]
    assert whitened_mse_loss(z, [slices], eps).item() == pytest.approx(loop_oracle(z, slices, eps), rel=1e-9)
    whole = whitened_mse_loss(z, eps=eps)
    assert whole.item() == pytest.approx(loop_oracle(z, [torch.arange(12)], eps), rel=1e-9)
    both = whitened_mse_loss(z, [slices, [torch.arange(12)]], eps)
    torch.testing.assert_close(both, (whitened_mse_loss(z, [slices], eps) + whole) / 2)


def test_invariances():
    z = random_views()
    loss = whitened_mse_loss(z, eps=0.0)
    order = torch.randperm(12)
    torch.testing.assert_close(whitened_mse_loss([view[order] for view in z], eps=0.0), loss)
    torch.testing.assert_close(whitened_mse_loss(z[::-1], eps=0.0), loss)
    stretched = z[0] * torch.tensor([0.1, 2.0, 30.0]) + 5  # each view is whitened on its own
    torch.testing.assert_close(whitened_mse_loss([stretched, z[1]], eps=0.0), loss)
    assert whitened_mse_loss([z[0], z[0]]).item() == pytest.approx(0.0, abs=1e-12)
    assert 0 < loss < 4


def test_slices_are_a_partition_with_no_slice_too_small():
    for images, sizes in [(256, [128, 128]), (300, [150, 150]), (129, [129]), (20, [20])]:
        (slices,) = random_slices(images, 128)
        assert [len(index) for index in slices] == sizes
        assert torch.cat(slices).sort().values.tolist() == list(range(images))


def test_slices_follow_the_random_state_and_one_slice_draws_nothing():
    torch.manual_seed(0)
    first = random_slices(8, 4, iterations=3)
    assert len(first) == 3
    assert any(not torch.equal(first[0][0], other[0]) for other in first[1:])
    torch.manual_seed(0)
    torch.testing.assert_close(random_slices(8, 4, iterations=3), first)
    state = torch.get_rng_state()
    assert len(random_slices(7, 4, iterations=3)) == 1
    assert torch.equal(torch.get_rng_state(), state)


def test_too_few_images_become_a_regular_simplex():
    for scale in (1.0, 5.0):
        whitened = whiten(torch.randn(5, 9, dtype=torch.float64) * scale, eps=1e-9)
        distances = torch.pdist(whitened)
        torch.testing.assert_close(distances, distances.mean().expand(10), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("images", [2, 16])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_eps_suffices_in_single_precision(images, scale):
    torch.manual_seed(0)
    views = [(scale * (torch.randn(images, 3) @ torch.randn(3, 64))).requires_grad_() for _ in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = whitened_mse_loss(views)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, views))
    assert whiten(views[0]).dtype == torch.float32
    assert whiten(views[0].bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("images", [3, 6])
def test_second_derivative(images):
    inputs = [view.requires_grad_() for view in random_views(images=images)]
    assert torch.autograd.gradgradcheck(lambda a, b: whitened_mse_loss([a, b], eps=0.05), inputs)


def test_equal_images_are_finite():
    views = [torch.ones(4, 3, requires_grad=True) for _ in range(2)]
    loss = whitened_mse_loss(views)
    assert loss.item() == pytest.approx(2.0)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, views))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: whiten(torch.randn(1, 3)), "2 images or more, got \\(1, 3\\)"),
        (lambda: whiten(torch.randn(3)), "z must be \\(N, P\\)"),
        (lambda: whiten(torch.randn(4, 3), eps=1.0), "eps must be in"),
        (lambda: whiten(torch.zeros(4, 8), eps=0.0), "that of 4 images in 8 dimensions with eps 0.0 is not"),
        (lambda: random_slices(8, 1), "size must be >= 2"),
        (lambda: random_slices(8, 4, 0), "iterations must be >= 1"),
        (lambda: whitened_mse_loss([torch.randn(4, 3)]), "two or more tensors of one shape"),
        (lambda: whitened_mse_loss([torch.randn(4, 3), torch.randn(4, 2)]), "two or more tensors"),
    ],
)
def test_wrong_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
