"""A bi-level problem whose meta-gradient is known in closed form."""

from dataclasses import replace

import pytest
import torch

from metamask_plugin.bilevel import (
    ESTIMATORS,
    BilevelProblem,
    Exact,
    FiniteDifference,
    FirstOrder,
    InnerStep,
    PlainStep,
    Unrolled,
)

D = 6


def problem():
    """L_in = |theta * w + phi - a|^2 / 2,  L_out = |theta * w + phi - b|^2 / 2,  h = theta."""
    generator = torch.Generator().manual_seed(0)
    theta, phi, w, a, b = torch.randn(5, D, dtype=torch.float64, generator=generator).unbind(0)
    loss_to = lambda target: lambda h, p, ws: 0.5 * (h * ws[0] + p["phi"] - target).pow(2).sum()  # noqa: E731
    bilevel = BilevelProblem(
        encode=lambda params: params["theta"] * 1.0,
        inner_loss=loss_to(a),
        outer_loss=loss_to(b),
        encoder_params={"theta": theta},
        head_params={"phi": phi},
        outer_params=(w,),
    )
    return bilevel, (theta, phi, w, a, b)


def analytic(values, lr):
    """Returns (first-order term, whole gradient), by hand."""
    theta, phi, w, a, b = values
    residual = theta * w + phi - a
    theta_t, phi_t = theta - lr * w * residual, phi - lr * residual
    v = theta_t * w + phi_t - b  # dL_out / d(theta_t * w + phi_t)
    direct = v * theta_t
    # d theta_t / dw = -lr * (residual + w * theta),  d phi_t / dw = -lr * theta
    return direct, direct - lr * (v * w * (residual + w * theta) + v * theta)


@pytest.mark.parametrize("lr", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("estimator", [Exact(), Unrolled()])
def test_exact_estimators_match_the_closed_form(estimator, lr):
    bilevel, values = problem()
    result = estimator.gradient(bilevel, InnerStep(PlainStep(lr), PlainStep(lr)))
    torch.testing.assert_close(result.outer_params[0], analytic(values, lr)[1], rtol=1e-12, atol=1e-12)


def test_learning_rates_of_encoder_and_heads_may_differ():
    bilevel, (theta, phi, w, a, b) = problem()
    result = Exact().gradient(bilevel, InnerStep(PlainStep(0.3), PlainStep(0.7)))
    residual = theta * w + phi - a
    theta_t, phi_t = theta - 0.3 * w * residual, phi - 0.7 * residual
    v = theta_t * w + phi_t - b
    expected = v * theta_t - 0.3 * v * w * (residual + w * theta) - 0.7 * v * theta
    torch.testing.assert_close(result.outer_params[0], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("weights", [torch.ones(3), [torch.ones(3)], (1.0,), None])
def test_weights_that_are_no_tuple_of_tensors_are_refused(weights):
    bilevel, *_ = problem()
    with pytest.raises(
        ValueError, match=r"outer_params must be a tuple of tensors, got a .*; write outer_params=\(mask,\)"
    ):
        replace(bilevel, outer_params=weights)


def test_first_order_is_the_direct_term_alone():
    bilevel, values = problem()
    direct, whole = analytic(values, 0.5)
    result = FirstOrder().gradient(bilevel, InnerStep(PlainStep(0.5), PlainStep(0.5)))
    torch.testing.assert_close(result.outer_params[0], direct, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(direct, whole, rtol=0.1)


@pytest.mark.parametrize(("r", "tolerance"), [(1e-2, 1e-10), (1e-5, 1e-7)])
def test_finite_difference_of_a_quadratic_is_exact_up_to_rounding_over_r(r, tolerance):
    bilevel, values = problem()
    whole = analytic(values, 0.5)[1]
    result = FiniteDifference(r).gradient(bilevel, InnerStep(PlainStep(0.5), PlainStep(0.5)))
    # d_w L_in is quadratic in (theta, phi), so the central difference has no truncation error
    assert (result.outer_params[0] - whole).norm() / whole.norm() < tolerance


def test_losses_on_the_way():
    bilevel, (theta, phi, w, a, b) = problem()
    for estimator in ESTIMATORS.values():
        result = estimator().gradient(bilevel, InnerStep(PlainStep(0.5), PlainStep(0.5)))
        residual = theta * w + phi - a
        outer = ((theta - 0.5 * w * residual) * w + phi - 0.5 * residual - b).pow(2).sum() / 2
        torch.testing.assert_close(result.inner_loss, residual.pow(2).sum() / 2)
        torch.testing.assert_close(result.outer_loss, outer)
        assert not result.inner_loss.requires_grad and not result.outer_params[0].requires_grad


def test_a_flat_outer_loss_gives_zero_not_nan():
    bilevel, _ = problem()
    flat = BilevelProblem(
        bilevel.encode,
        bilevel.inner_loss,
        lambda h, p, ws: 0.0 * (h * ws[0] + p["phi"]).sum(),
        bilevel.encoder_params,
        bilevel.head_params,
        bilevel.outer_params,
    )
    for estimator in ESTIMATORS.values():
        result = estimator().gradient(flat, InnerStep(PlainStep(0.5), PlainStep(0.5)))
        assert torch.equal(result.outer_params[0], torch.zeros(D, dtype=torch.float64))


def test_wrong_settings():
    with pytest.raises(ValueError, match="r must be > 0"):
        FiniteDifference(0.0)
    with pytest.raises(ValueError, match="lr must be >= 0"):
        PlainStep(-0.1)
