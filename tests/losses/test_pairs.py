import pytest
import torch

from metamask_plugin.losses.pairs import byol_loss, negative_cosine_loss


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    return torch.randn(5, 4), torch.randn(5, 4)


def test_against_loops(tensors):
    p, z = tensors
    cosines = [float(u @ v / (u.norm() * v.norm())) for u, v in zip(p, z)]
    assert negative_cosine_loss(p, z).item() == pytest.approx(-sum(cosines) / 5, rel=1e-12)
    distances = [float((u / u.norm() - v / v.norm()).pow(2).sum()) for u, v in zip(p, z)]
    assert byol_loss(p, z).item() == pytest.approx(sum(distances) / 5, rel=1e-12)
    torch.testing.assert_close(byol_loss(p, z), 2 + 2 * negative_cosine_loss(p, z))


def test_length_and_order_do_not_count(tensors):
    p, z = tensors
    order = torch.randperm(5)
    torch.testing.assert_close(negative_cosine_loss(7 * p[order], z[order] / 9), negative_cosine_loss(p, z))


@pytest.mark.parametrize("images", [1, 2])
def test_bounds_are_reached(double, images):
    p = torch.randn(images, 4)
    for loss, least, most in ((negative_cosine_loss, -1, 1), (byol_loss, 0, 4)):
        assert loss(p, 3 * p).item() == pytest.approx(least, abs=1e-12)
        assert loss(p, -p).item() == pytest.approx(most)


def test_gradients_go_to_both_arguments(tensors):
    inputs = [tensor.requires_grad_() for tensor in tensors]
    assert all(gradient.any() for gradient in torch.autograd.grad(negative_cosine_loss(*inputs), inputs))
    assert torch.autograd.gradgradcheck(negative_cosine_loss, inputs)


@pytest.mark.parametrize("loss", [negative_cosine_loss, byol_loss])
@pytest.mark.parametrize("shapes", [((5, 4), (5, 3)), ((5, 4), (4, 4)), ((4,), (4,)), ((0, 4), (0, 4))])
def test_shapes_that_do_not_fit(loss, shapes):
    with pytest.raises(ValueError, match=r"p and z must be of one shape \(N, P\), N >= 1, got"):
        loss(*(torch.randn(shape) for shape in shapes))
