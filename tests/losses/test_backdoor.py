import math

import pytest
import torch

from metamask_plugin.losses import backdoor_adjusted_loss, mean_over_pairs, nt_xent_loss


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


def loop_oracle(views, weighted, temperature):
    """Eqs. (4) and (6) term by term, with the exponentials, averaged over the anchors."""
    images, terms = len(views[0]), []
    for j in range(len(views)):
        for k in range(len(views)):
            if k == j:
                continue
            for i in range(images):
                negatives = sum(
                    math.exp(cosine(views[j][i], views[m][other]) / temperature)
                    for m in range(len(views))
                    for other in range(images)
                    if other != i
                )
                n = weighted[k].shape[1]
                p = 0.0
                for t in range(n):
                    positive = math.exp(cosine(views[j][i], weighted[k][i, t]) / temperature)
                    p += positive / (positive + negatives) / n
                terms.append(-math.log(p))
    return sum(terms) / len(terms)


def random_views(views=2, images=5, strata=3, dim=4):
    torch.manual_seed(0)
    z = [torch.randn(images, dim, dtype=torch.float64) for _ in range(views)]
    return z, [torch.randn(images, strata, dim, dtype=torch.float64) for _ in range(views)]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_against_loops(views, temperature):
    z, weighted = random_views(views)
    ours = backdoor_adjusted_loss(z, weighted, temperature)
    assert ours.item() == pytest.approx(loop_oracle(z, weighted, temperature), rel=1e-12)


def test_one_stratum_of_ones_is_nt_xent():
    z, _ = random_views()
    ones = [view[:, None] * torch.ones(1, 1, 4, dtype=torch.float64) for view in z]
    torch.testing.assert_close(backdoor_adjusted_loss(z, ones, 0.3), nt_xent_loss(z, 0.3))


def test_equal_strata_count_once():
    z, weighted = random_views(strata=1)
    repeated = [view.expand(-1, 6, -1) for view in weighted]
    torch.testing.assert_close(backdoor_adjusted_loss(z, repeated), backdoor_adjusted_loss(z, weighted))


def test_anchors_and_negatives_are_not_weighted():
    z, weighted = random_views()
    z[1].requires_grad_()
    # the second view is an anchor and a negative, but no positive: those are in `weighted`
    (gradient,) = torch.autograd.grad(backdoor_adjusted_loss(z, weighted), z[1])
    assert gradient.abs().sum() > 0
    first = backdoor_adjusted_loss(z, weighted)
    weighted[0] = weighted[0] * 7.0  # cosine: length does not count
    torch.testing.assert_close(backdoor_adjusted_loss(z, weighted), first)


def test_small_temperatures_stay_finite():
    z, weighted = random_views()
    for view in [*z, *weighted]:
        view.requires_grad_()
    loss = backdoor_adjusted_loss(z, weighted, temperature=1e-3)
    assert loss.isfinite()
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [*z, *weighted]))


def test_second_derivative():
    z, weighted = random_views(images=3, strata=2)
    inputs = [x.requires_grad_() for x in (*z, *weighted)]
    assert torch.autograd.gradgradcheck(lambda a, b, c, d: backdoor_adjusted_loss([a, b], [c, d]), inputs)


def test_without_negatives_it_is_the_mean_over_strata_and_ordered_pairs():
    def distance(anchor, positive):
        return (anchor - positive).pow(2).sum()

    z, weighted = random_views(views=3)
    terms = [
        float(distance(z[j], weighted[k][:, t]))
        for j in range(3)
        for k in range(3)
        if j != k
        for t in range(3)
    ]
    assert mean_over_pairs(distance, z, weighted).item() == pytest.approx(sum(terms) / len(terms))


def test_positives_may_be_fewer_than_views():
    """As where they come from a target network, which sees the large crops alone."""
    z, weighted = random_views(views=3)
    for positives in (1, 2):
        terms = [
            float(torch.dist(z[j], weighted[k][:, t]))
            for j in range(3)
            for k in range(positives)
            if j != k
            for t in range(3)
        ]
        ours = mean_over_pairs(torch.dist, z, weighted[:positives])
        assert ours.item() == pytest.approx(sum(terms) / len(terms))


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (backdoor_adjusted_loss, r"\(N, n, P\)"),
        (lambda z, w: mean_over_pairs(torch.dist, z, w), r"positives at most as many of \(N, P\)"),
    ],
)
def test_shapes_that_do_not_fit(loss, message):
    z, weighted = random_views()
    other_number = weighted[:1] if loss is backdoor_adjusted_loss else [*weighted, weighted[0]]
    for views, strata in (
        (z[:1], weighted[:1]),
        (z, other_number),
        (z, []),
        (z, [z[0][:, None], z[1]]),
        (z, [w[:, :, :2] for w in weighted]),
        (z, [w[:3] for w in weighted]),
    ):
        with pytest.raises(ValueError, match=message):
            loss(views, strata)


def test_settings_that_cannot_be():
    z, weighted = random_views()
    with pytest.raises(ValueError, match="temperature must be > 0"):
        backdoor_adjusted_loss(z, weighted, 0.0)
    with pytest.raises(ValueError, match="no negatives"):
        backdoor_adjusted_loss([view[:1] for view in z], [view[:1] for view in weighted])
