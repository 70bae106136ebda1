import math

import pytest
import torch

from metamask_plugin.losses import uniformity_loss


def loop_oracle(vectors, t):
    """Eq. (9) for one set of vectors."""
    unit = [v / v.norm() for v in vectors]
    return math.log(sum(math.exp(2 * t * float(a @ b) - 2 * t) for a in unit for b in unit))


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return torch.randn(4, 3, 5, dtype=torch.float64)


@pytest.mark.parametrize("t", [0.5, 2.0])
def test_against_loops(weights, t):
    image = sum(loop_oracle(a, t) for a in weights) / 4
    assert uniformity_loss(weights, t).item() == pytest.approx(image, rel=1e-12)
    batch = loop_oracle(weights.flatten(0, 1), t)
    assert uniformity_loss(weights, t, scope="batch").item() == pytest.approx(batch, rel=1e-12)


def test_bounds(weights):
    equal = weights[:, :1].expand(-1, 3, -1)
    assert uniformity_loss(equal).item() == pytest.approx(2 * math.log(3))
    apart = torch.eye(3, 5, dtype=torch.float64).expand(4, -1, -1)
    assert math.log(3) < uniformity_loss(apart).item() < uniformity_loss(equal).item()


def test_length_does_not_count(weights):
    scaled = weights * torch.rand(4, 3, 1, dtype=torch.float64).add(0.1)
    torch.testing.assert_close(uniformity_loss(scaled), uniformity_loss(weights))


def test_across_the_batch_images_repel_each_other(weights):
    same_for_all = torch.eye(3, 5, dtype=torch.float64).expand(4, -1, -1)
    assert uniformity_loss(same_for_all) < uniformity_loss(weights)
    assert uniformity_loss(same_for_all, scope="batch") > uniformity_loss(weights, scope="batch")


def test_second_derivative(weights):
    assert torch.autograd.gradgradcheck(uniformity_loss, [weights[:2, :, :3].clone().requires_grad_()])


def test_settings_that_cannot_be(weights):
    with pytest.raises(ValueError, match=r"shape \(N, n, C\), got \(3, 5\)"):
        uniformity_loss(weights[0])
    with pytest.raises(ValueError, match="t must be > 0"):
        uniformity_loss(weights, 0.0)
    with pytest.raises(ValueError, match="image, batch, got 'world'"):
        uniformity_loss(weights, scope="world")
