"""SSL-HSIC's two estimates against NumPy and loops."""

import numpy as np
import pytest
import torch

from metamask_plugin.losses.hsic import KERNELS, gram_matrix, hsic_loss, hsic_zy, hsic_zz


def kernel_oracle(u, v, kernel, scale):
    u, v = u / np.linalg.norm(u), v / np.linalg.norm(v)
    distance = np.linalg.norm(u - v)
    return {
        "imq": scale / np.sqrt(scale**2 + distance**2),
        "gaussian": np.exp(-(distance**2) / (2 * scale**2)),
        "linear": u @ v,
    }[kernel]


def loss_oracle(views, gamma, kernel, scale):
    views = [view.numpy() for view in views]
    images, z = len(views[0]), np.concatenate(views)
    positives = [
        kernel_oracle(views[p][i], views[q][i], kernel, scale)
        for p in range(len(views))
        for q in range(len(views))
        for i in range(images)
        if p != q
    ]
    gram = np.array([[kernel_oracle(u, v, kernel, scale) for v in z] for u in z])
    n = len(z)
    h = np.eye(n) - 1 / n
    zz = np.trace(gram @ h @ gram @ h) / (n - 1) ** 2
    return -(np.mean(positives) - gram.mean()) + gamma * np.sqrt(zz)


def random_views(views=3, images=4, dim=5):
    torch.manual_seed(0)
    return [torch.randn(images, dim) for _ in range(views)]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("views", "images"), [(2, 2), (3, 4), (4, 3)])
def test_against_numpy(double, kernel, views, images):
    z = random_views(views, images)
    ours = hsic_loss(z, 1.7, kernel, 0.6)
    assert ours.item() == pytest.approx(loss_oracle(z, 1.7, kernel, 0.6), rel=1e-9)


def test_the_kernel_is_the_papers_by_default(double):
    z = random_views()
    torch.testing.assert_close(hsic_loss(z), hsic_loss(z, 3.0, "imq", 1.0), rtol=0, atol=0)


def test_the_release_adds_a_constant(double):
    """Its sum over an image's views takes each pair of a projection with itself in."""
    z = random_views(views=4)
    gram = gram_matrix(torch.cat(z))
    blocks = gram.view(4, 4, 4, 4)  # view, image, view, image
    of_release = sum(blocks[:, i, :, i].sum() for i in range(4)) / (4 * 4 * 3) - gram.mean()
    torch.testing.assert_close(hsic_zy(gram, 4), of_release - 1 / 3)


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_are_one_at_distance_zero(double, kernel):
    torch.testing.assert_close(gram_matrix(random_views()[0], kernel).diagonal(), torch.ones(4))


def test_identical_views(double):
    z = random_views(1)[0]
    gram = gram_matrix(torch.cat([z, z]))
    torch.testing.assert_close(hsic_zy(gram, 2), 1 - gram.mean())


def test_invariances(double):
    z = random_views()
    loss = hsic_loss(z)
    order = torch.randperm(4)
    torch.testing.assert_close(hsic_loss([view[order] for view in z]), loss)
    torch.testing.assert_close(hsic_loss(z[::-1]), loss)
    torch.testing.assert_close(hsic_loss([7 * z[0], z[1], 0.1 * z[2]]), loss)


@pytest.mark.parametrize("kernel", KERNELS)
def test_second_derivative(double, kernel):
    z = [view.requires_grad_() for view in random_views(views=2, images=2, dim=3)]
    assert torch.autograd.gradgradcheck(lambda *views: hsic_loss(views, 3.0, kernel, 0.5), z)


@pytest.mark.parametrize("kernel", KERNELS)
def test_second_derivative_at_distance_zero(double, kernel):
    z = random_views(views=1, images=2, dim=3)[0]
    views = [z.clone().requires_grad_(), z.clone().requires_grad_()]
    assert torch.autograd.gradgradcheck(lambda *views: hsic_loss(views, 3.0, kernel, 0.5), views)


def test_derivatives_are_finite_where_all_projections_coincide(double):
    z = torch.ones(4, 3, requires_grad=True)
    gram = gram_matrix(torch.cat([z, z]))
    assert hsic_zz(gram).item() == pytest.approx(0, abs=1e-30)
    loss = hsic_loss([z, z])
    assert loss.item() == pytest.approx(3e-6)
    (grad,) = torch.autograd.grad(loss, z, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum() + grad.sum(), z)
    assert grad.isfinite().all() and second.isfinite().all()


def test_small_scales_stay_finite_in_float32():
    z = [view.requires_grad_() for view in (torch.randn(64, 128),) * 2]
    loss = hsic_loss(z, scale=0.01)
    (grad,) = torch.autograd.grad(loss, z[0])
    assert loss.isfinite() and grad.isfinite().all()


@pytest.mark.parametrize(
    ("views", "settings", "message"),
    [
        ([torch.randn(4, 5)], {}, "two or more tensors of one shape"),
        ([torch.randn(4, 5), torch.randn(3, 5)], {}, "of one shape"),
        ([torch.randn(4, 2, 5)] * 2, {}, "of one shape \\(N, P\\)"),
        ([torch.randn(1, 5)] * 2, {}, "2 images or more, got 1"),
        ([torch.randn(4, 5)] * 2, {"gamma": -1.0}, "gamma must be >= 0"),
        (
            [torch.randn(4, 5)] * 2,
            {"kernel": "rbf"},
            "kernel must be one of imq, gaussian, linear, got 'rbf'",
        ),
        ([torch.randn(4, 5)] * 2, {"scale": 0.001}, "scale must be >= 0.01"),
    ],
)
def test_wrong_input(views, settings, message):
    with pytest.raises(ValueError, match=message):
        hsic_loss(views, **settings)
