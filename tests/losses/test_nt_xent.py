import math

import pytest
import torch

from metamask_plugin.losses import nt_xent_loss


def loop_oracle(views, temperature, symmetric):
    """Eq. (1) term by term, averaged."""
    n, m = len(views[0]), len(views)
    z = [[v / v.norm() for v in view] for view in views]
    terms = []
    for j in range(m):
        for k in range(m):
            if j == k or (not symmetric and k < j):
                continue
            for i in range(n):
                denominator = sum(
                    math.exp(float(z[j][i] @ z[jj][ii]) / temperature)
                    for ii in range(n)
                    for jj in range(m)
                    if (ii, jj) != (i, j)
                )
                terms.append(-math.log(math.exp(float(z[j][i] @ z[k][i]) / temperature) / denominator))
    return sum(terms) / len(terms)


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_loops(views, symmetric):
    torch.manual_seed(0)
    z = [torch.randn(5, 4, dtype=torch.float64) for _ in range(views)]
    ours = nt_xent_loss(z, temperature=0.3, symmetric=symmetric)
    assert ours.item() == pytest.approx(loop_oracle(z, 0.3, symmetric), rel=1e-12)


def test_single_sample_has_only_its_positive_and_costs_nothing():
    z = torch.randn(1, 8)
    assert nt_xent_loss([z, torch.randn(1, 8)]).item() == pytest.approx(0.0, abs=1e-6)


def test_invariant_to_scale_batch_order_and_view_order():
    torch.manual_seed(1)
    z1, z2 = torch.randn(2, 6, 5, dtype=torch.float64)
    order = torch.randperm(6)
    reference = nt_xent_loss([z1, z2])
    torch.testing.assert_close(nt_xent_loss([3 * z1, 0.1 * z2]), reference)
    torch.testing.assert_close(nt_xent_loss([z1[order], z2[order]]), reference)
    torch.testing.assert_close(nt_xent_loss([z2, z1]), reference)


def test_second_derivative_is_right():
    torch.manual_seed(2)
    z1, z2 = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True).unbind(0)
    z1, z2 = (z.detach().requires_grad_() for z in (z1, z2))
    assert torch.autograd.gradgradcheck(lambda a, b: nt_xent_loss([a, b], 0.5), (z1, z2))


@pytest.mark.parametrize(
    ("views", "temperature", "message"),
    [
        ([torch.randn(4, 2)], 0.5, "two or more tensors"),
        ([torch.randn(4, 2), torch.randn(3, 2)], 0.5, "one shape"),
        ([torch.randn(4, 2), torch.randn(4, 2)], 0.0, "temperature must be > 0"),
    ],
)
def test_wrong_input(views, temperature, message):
    with pytest.raises(ValueError, match=message):
        nt_xent_loss(views, temperature)
