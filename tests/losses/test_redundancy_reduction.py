import pytest
import torch
from torch import nn

from metamask_plugin.losses import cross_correlation, redundancy_reduction_loss


def loop_oracle(z1, z2, lamb):
    """Eqs. (2) and (3) entry by entry, on whatever centring the caller did."""
    total = 0.0
    for k in range(z1.shape[1]):
        for m in range(z1.shape[1]):
            c = (z1[:, k] * z2[:, m]).sum() / (z1[:, k].pow(2).sum().sqrt() * z2[:, m].pow(2).sum().sqrt())
            total += (1 - c) ** 2 if k == m else lamb * c**2
    return total


@pytest.fixture
def views():
    torch.manual_seed(0)
    return torch.randn(7, 5, dtype=torch.float64) + 1.0, torch.randn(7, 5, dtype=torch.float64) - 0.5


def test_uncentred_is_the_papers_equation(views):
    z1, z2 = views
    torch.testing.assert_close(redundancy_reduction_loss(z1, z2, 0.1), loop_oracle(z1, z2, 0.1))


def test_centred_is_barlow_twins(views):
    z1, z2 = views
    norm = nn.BatchNorm1d(5, affine=False, eps=1e-15, dtype=torch.float64)
    expected = norm(z1).T @ norm(z2) / len(z1)
    torch.testing.assert_close(cross_correlation(z1, z2, "centred"), expected)
    oracle = loop_oracle(z1 - z1.mean(0), z2 - z2.mean(0), 0.1)
    torch.testing.assert_close(redundancy_reduction_loss(z1, z2, 0.1, "centred"), oracle)


def test_official_divides_by_the_sample_deviation(views):
    z1, z2 = views
    standardise = lambda z: (z - z.mean(0)) / z.std(0)  # noqa: E731
    expected = standardise(z1).T @ standardise(z2) / len(z1)
    torch.testing.assert_close(cross_correlation(z1, z2, "official"), expected)


def test_forms_differ_where_the_mean_is_not_zero(views):
    values = {form: redundancy_reduction_loss(*views, form=form).item() for form in ("uncentred", "centred")}
    assert values["uncentred"] != pytest.approx(values["centred"], rel=1e-3)


def test_equal_decorrelated_views_cost_nothing():
    z = torch.eye(4, dtype=torch.float64)
    assert redundancy_reduction_loss(z, z, 1.0).item() == pytest.approx(0.0, abs=1e-12)


def test_a_dead_dimension_gives_a_finite_loss_and_gradient():
    z1, z2 = torch.randn(6, 3), torch.randn(6, 3)
    z1[:, 1] = 0.0
    z1.requires_grad_()
    loss = redundancy_reduction_loss(z1, z2)
    (gradient,) = torch.autograd.grad(loss, z1)
    assert loss.isfinite() and gradient.isfinite().all()


def test_swapping_views_transposes_and_keeps_the_loss(views):
    z1, z2 = views
    torch.testing.assert_close(cross_correlation(z1, z2), cross_correlation(z2, z1).T)
    torch.testing.assert_close(redundancy_reduction_loss(z1, z2), redundancy_reduction_loss(z2, z1))


def test_wrong_input():
    with pytest.raises(ValueError, match="one shape"):
        cross_correlation(torch.randn(4, 2), torch.randn(4, 3))
    with pytest.raises(ValueError, match="form must be one of"):
        cross_correlation(torch.randn(4, 2), torch.randn(4, 2), "whitened")
