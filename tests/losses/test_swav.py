"""The swapped prediction loss against loops."""

import math

import pytest
import torch

from metamask_plugin.losses.swav import multi_crop_loss, swapped_prediction_loss


def loop_oracle(codes, strata, temperature):
    """-sum_k q_k log of the average over t of p_k,t, averaged over images."""
    total = 0.0
    for i in range(len(codes)):
        predictions = []
        for t in range(strata.shape[1]):
            exponentials = [math.exp(float(s) / temperature) for s in strata[i, t]]
            predictions.append([e / sum(exponentials) for e in exponentials])
        for k in range(codes.shape[1]):
            mean = sum(p[k] for p in predictions) / len(predictions)
            total -= float(codes[i, k]) * math.log(mean)
    return total / len(codes)


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    return torch.randn(5, 4).softmax(1), torch.randn(5, 3, 4)


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_against_loops(tensors, temperature):
    codes, strata = tensors
    ours = swapped_prediction_loss(codes, strata, temperature)
    assert ours.item() == pytest.approx(loop_oracle(codes, strata, temperature), rel=1e-12)


def test_one_prediction_is_cross_entropy_and_equal_strata_count_once(tensors):
    codes, strata = tensors
    one = swapped_prediction_loss(codes, strata[:, 0], 0.2)
    torch.testing.assert_close(one, torch.nn.functional.cross_entropy(strata[:, 0] / 0.2, codes))
    torch.testing.assert_close(swapped_prediction_loss(codes, strata[:, :1].repeat(1, 6, 1), 0.2), one)


def test_order_of_the_batch_does_not_count_and_one_image_is_a_batch(tensors):
    codes, strata = tensors
    order = torch.randperm(5)
    whole = swapped_prediction_loss(codes, strata)
    torch.testing.assert_close(swapped_prediction_loss(codes[order], strata[order]), whole)
    singles = [swapped_prediction_loss(codes[i : i + 1], strata[i : i + 1]) for i in range(5)]
    torch.testing.assert_close(torch.stack(singles).mean(), whole)


def test_multi_crop_is_the_mean_of_equation_6(double):
    torch.manual_seed(0)
    codes = [torch.randn(5, 4).softmax(1) for _ in range(2)]
    scores = [torch.randn(5, 4) for _ in range(4)]
    terms = [loop_oracle(codes[i], scores[v][:, None], 0.1) for i in range(2) for v in range(4) if v != i]
    assert len(terms) == 6
    assert multi_crop_loss(codes, scores).item() == pytest.approx(sum(terms) / 6, rel=1e-12)
    both_ways = multi_crop_loss(codes, scores[:2])
    torch.testing.assert_close(multi_crop_loss(codes[::-1], scores[1::-1]), both_ways)


def test_small_temperatures_stay_finite(tensors):
    codes, strata = tensors
    strata.requires_grad_()
    loss = swapped_prediction_loss(codes, strata, 1e-4)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, strata)[0].isfinite().all()


def test_second_derivative(tensors):
    codes, strata = tensors
    inputs = strata[:2].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda s: swapped_prediction_loss(codes[:2], s, 0.5), inputs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.randn(5, 3)}, r"codes must be \(N, K\)"),
        ({"scores": torch.randn(4, 2, 4)}, r"codes must be \(N, K\)"),
        ({"codes": torch.rand(4)}, r"codes must be \(N, K\)"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_wrong_input(change, message):
    with pytest.raises(ValueError, match=message):
        swapped_prediction_loss(**{"codes": torch.rand(5, 4), "scores": torch.randn(5, 4), **change})


@pytest.mark.parametrize(("codes", "views"), [(1, 1), (0, 2), (3, 2)])
def test_wrong_numbers_of_views(codes, views):
    with pytest.raises(ValueError, match=f"two or more views .* got {views} and {codes}"):
        multi_crop_loss([torch.rand(5, 4)] * codes, [torch.randn(5, 4)] * views)
