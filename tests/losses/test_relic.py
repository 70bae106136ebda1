"""RELIC's objective against loops over its likelihoods."""

import math

import pytest
import torch
import torch.nn.functional as F

from metamask_plugin.losses.relic import mean_divergence, relic_loss


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


def likelihood(anchor, candidates, temperature):
    e = [math.exp(cosine(anchor, candidate) / temperature) for candidate in candidates]
    return [x / sum(e) for x in e]


def loop_oracle(projections, targets, temperature, alpha, bank, weighted=None):
    """Eq. (3) image by image; the candidates are the targets of one view, and the bank."""
    images = range(len(targets[0]))
    pairs = [(j, k) for j in range(len(projections)) for k in range(len(targets)) if j != k]
    contrast = divergence = 0.0
    for i in images:
        p = {}
        for j, k in pairs:
            candidates = [*targets[k], *bank]
            p[j, k] = likelihood(projections[j][i], candidates, temperature)
            strata = [targets[k][i]] if weighted is None else weighted[k][i]
            others = [c for m, c in enumerate(candidates) if m != i]
            of_strata = [likelihood(projections[j][i], [s, *others], temperature)[0] for s in strata]
            contrast -= math.log(sum(of_strata) / len(strata)) / len(pairs) / len(images)
        for a in pairs:
            for b in pairs:
                if a != b:
                    kl = sum(x * math.log(x / y) for x, y in zip(p[a], p[b]))
                    divergence += kl / (len(pairs) * (len(pairs) - 1)) / len(images)
    return contrast + alpha * divergence


def tensors(views, targets, images=4, strata=3, dim=5):
    torch.manual_seed(0)
    return (
        [torch.randn(images, dim) for _ in range(views)],
        [torch.randn(images, dim) for _ in range(targets)],
        [torch.randn(images, strata, dim) for _ in range(targets)],
        torch.randn(6, dim),
    )


@pytest.mark.parametrize(("views", "large"), [(2, 2), (3, 3), (4, 2), (2, 1)])
@pytest.mark.parametrize("with_bank", [False, True])
@pytest.mark.parametrize("with_strata", [False, True])
def test_against_loops(double, views, large, with_bank, with_strata):
    z, h, weighted, bank = tensors(views, large)
    bank, weighted = bank if with_bank else bank[:0], weighted if with_strata else None
    ours = relic_loss(z, h, 0.4, 1.7, bank, weighted)
    assert ours.item() == pytest.approx(loop_oracle(z, h, 0.4, 1.7, bank, weighted), rel=1e-11)


def test_without_divergence_it_is_cross_entropy(double):
    (z1, z2), (h1, h2), _, _ = tensors(2, 2)
    images = torch.arange(4)

    def cross_entropy(z, h):
        return F.cross_entropy(F.normalize(z) @ F.normalize(h).T / 0.3, images)

    expected = (cross_entropy(z1, h2) + cross_entropy(z2, h1)) / 2
    torch.testing.assert_close(relic_loss([z1, z2], [h1, h2], 0.3, alpha=0.0), expected)


def test_identical_views_have_no_divergence(double):
    (z, _), (h, _), _, _ = tensors(2, 2)
    alphas = [relic_loss([z, z], [h, h], alpha=alpha) for alpha in (0.0, 100.0)]
    torch.testing.assert_close(*alphas, rtol=1e-12, atol=1e-12)


def test_strata_enter_the_contrast_alone(double):
    z, h, weighted, bank = tensors(2, 2)
    unweighted = [view[:, None].expand(-1, 3, -1) for view in h]
    torch.testing.assert_close(relic_loss(z, h, bank=bank, weighted=unweighted), relic_loss(z, h, bank=bank))
    divergence = relic_loss(z, h, alpha=1.0) - relic_loss(z, h, alpha=0.0)
    with_strata = [relic_loss(z, h, alpha=alpha, weighted=weighted) for alpha in (0.0, 1.0)]
    torch.testing.assert_close(with_strata[1] - with_strata[0], divergence)


def test_invariances(double):
    z, h, _, bank = tensors(2, 2)
    loss = relic_loss(z, h, bank=bank)
    order = torch.randperm(4)
    torch.testing.assert_close(relic_loss([v[order] for v in z], [v[order] for v in h], bank=bank), loss)
    torch.testing.assert_close(relic_loss(z[::-1], h[::-1], bank=bank), loss)
    torch.testing.assert_close(relic_loss([7 * v for v in z], [3 * v for v in h], bank=2 * bank), loss)


def test_divergence_is_that_of_torch(double):
    log_p = torch.randn(3, 4, 5).log_softmax(dim=2)
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    expected = sum(F.kl_div(log_p[b], log_p[a], reduction="batchmean", log_target=True) for a, b in pairs) / 6
    torch.testing.assert_close(mean_divergence(log_p), expected)
    assert mean_divergence(log_p[:1]) == 0


def test_no_likelihood_of_the_divergence_is_detached(double):
    z, h, _, _ = tensors(2, 2)
    leaves = [view.requires_grad_() for view in (*z, *h)]
    divergence = relic_loss(z, h, alpha=1.0) - relic_loss(z, h, alpha=0.0)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(divergence, leaves))


def test_second_derivative(double):
    z, h, weighted, bank = tensors(2, 2, images=2, strata=2, dim=3)
    inputs = [x.requires_grad_() for x in (*z, *h, *weighted)]
    assert torch.autograd.gradgradcheck(
        lambda a, b, c, d, e, f: relic_loss([a, b], [c, d], 0.5, 0.7, bank[:2, :3], [e, f]), inputs
    )


def test_one_image_needs_a_bank(double):
    z, h, _, bank = tensors(2, 2, images=1)
    with pytest.raises(ValueError, match="needs a negative"):
        relic_loss(z, h)
    assert relic_loss(z, h, bank=bank).isfinite()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"projections": [torch.randn(4, 5)]}, "projections must be two or more"),
        ({"targets": []}, "targets at most as many"),
        ({"targets": [torch.randn(4, 5)] * 3}, "at most as many"),
        ({"targets": [torch.randn(3, 5)] * 2}, "one shape"),
        ({"weighted": [torch.randn(4, 2, 5)]}, "weighted must be one a target"),
        ({"weighted": [torch.randn(5)] * 2}, "weighted at most as many"),
        ({"bank": torch.randn(6, 4)}, "bank must be \\(K, 5\\)"),
        ({"alpha": -1.0}, "alpha must be >= 0"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_wrong_input(change, message):
    arguments = {"projections": [torch.randn(4, 5)] * 2, "targets": [torch.randn(4, 5)] * 2}
    with pytest.raises(ValueError, match=message):
        relic_loss(**{**arguments, **change})
