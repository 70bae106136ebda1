"""Sinkhorn-Knopp against its plain form in NumPy, and what its codes promise."""

import numpy as np
import pytest
import torch

from metamask_plugin.losses.sinkhorn import sinkhorn_codes


def plain_oracle(scores, epsilon, iterations):
    """Eq. (5) as the paper has it, prototypes by images: rows to 1/K, then columns to 1/B."""
    q = np.exp(scores.numpy().T / epsilon)
    q /= q.sum()
    prototypes, images = q.shape
    for _ in range(iterations):
        for k in range(prototypes):
            q[k] /= q[k].sum() * prototypes
        for b in range(images):
            q[:, b] /= q[:, b].sum() * images
    return torch.from_numpy((q * images).T)


@pytest.fixture
def scores():
    torch.manual_seed(0)
    return torch.rand(7, 4, dtype=torch.float64) * 2 - 1


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.05, 3), (0.5, 1), (0.3, 10)])
def test_against_the_plain_form(scores, epsilon, iterations):
    ours = sinkhorn_codes(scores, epsilon, iterations)
    torch.testing.assert_close(ours, plain_oracle(scores, epsilon, iterations))


def test_codes_sum_to_one_at_once_and_use_all_prototypes_alike_in_the_end(scores):
    torch.testing.assert_close(sinkhorn_codes(scores, 0.3, 1).sum(1), torch.ones(7, dtype=torch.float64))
    few, many = (sinkhorn_codes(scores, 0.3, n).sum(0) - 7 / 4 for n in (1, 1000))
    assert few.abs().max() > 0.01
    assert many.abs().max() < 1e-9


def test_the_limit_is_the_solution_of_equation_3(scores):
    q, epsilon = sinkhorn_codes(scores, 0.3, 1000) / 7, 0.3

    def objective(q):
        return (q * scores).sum() - epsilon * torch.xlogy(q, q).sum()

    best = objective(q)
    for _ in range(20):  # directions that keep all sums of rows and columns
        change = torch.randn_like(q)
        change = change - change.mean(0) - change.mean(1, keepdim=True) + change.mean()
        assert objective(q + 1e-2 * q.min() * change / change.abs().max()) < best


def test_order_of_the_batch_and_a_constant_do_not_count(scores):
    order = torch.randperm(7)
    torch.testing.assert_close(sinkhorn_codes(scores[order]), sinkhorn_codes(scores)[order])
    torch.testing.assert_close(sinkhorn_codes(scores + 3), sinkhorn_codes(scores))


def test_past_images_take_part_and_get_no_code(scores):
    joint = sinkhorn_codes(torch.cat([scores[:3], scores[3:]]))
    torch.testing.assert_close(sinkhorn_codes(scores[:3], past=scores[3:]), joint[:3])


def test_one_image_or_many_equal_ones_are_shared_equally(scores):
    for batch in (scores[:1], scores[:1].repeat(5, 1)):
        torch.testing.assert_close(sinkhorn_codes(batch), torch.full_like(batch, 1 / 4))


@pytest.mark.parametrize("epsilon", [1e-5, 1e-3, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_epsilon_is_too_small_for_float32(scores, epsilon, dtype):
    codes = sinkhorn_codes(scores.to(dtype), epsilon)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(codes.sum(1), torch.ones(7))


def test_carries_no_gradient(scores):
    assert not sinkhorn_codes(scores.requires_grad_()).requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(3)}, r"scores must be \(B, K\)"),
        ({"scores": torch.randn(0, 4)}, r"scores must be \(B, K\)"),
        ({"past": torch.randn(3, 5)}, r"past \(Q, K\)"),
        ({"epsilon": 0.0}, "epsilon must be > 0"),
        ({"iterations": 0}, "iterations must be >= 1"),
    ],
)
def test_wrong_input(change, message):
    with pytest.raises(ValueError, match=message):
        sinkhorn_codes(**{"scores": torch.randn(3, 4), **change})
