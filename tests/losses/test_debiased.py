"""The debiased denominator against loops."""

import math

import pytest
import torch

from metamask_plugin.losses import backdoor_adjusted_loss, contrastive_loss
from metamask_plugin.losses.debiased import debiased_negative_mass


def cosine(u, v):
    return float(u @ v / (u.norm() * v.norm()))


def loop_oracle(anchors, strata, candidates, excluded, tau_plus, temperature, beta):
    """The formula term by term, the maximum included; also how often its second term was the larger."""
    total, bounded = 0.0, 0
    for i, anchor in enumerate(anchors):
        kept = [c for k, c in enumerate(candidates) if not excluded[i, k]]
        e = [math.exp(cosine(anchor, c) / temperature) for c in kept]
        weights = [x**beta for x in e]
        s = len(e) * sum(w * x for w, x in zip(weights, e)) / sum(weights)
        likelihood = 0.0
        for positive in strata[i]:
            p = math.exp(cosine(anchor, positive) / temperature)
            estimate = (s - len(e) * tau_plus * p) / (1 - tau_plus)
            bound = len(e) * math.exp(-1 / temperature)
            bounded += estimate < bound
            likelihood += p / (p + max(estimate, bound)) / len(strata[i])
        total -= math.log(likelihood)
    return total / len(anchors), bounded


@pytest.fixture
def tensors(double):
    torch.manual_seed(0)
    anchors, strata, candidates = torch.randn(6, 5), torch.randn(6, 3, 5), torch.randn(9, 5)
    # one positive so near, and its anchor's negatives so far, that what is subtracted exceeds the sum
    strata[0, 0] = anchors[0]
    candidates = candidates - candidates @ anchors[0][:, None] / anchors[0].pow(2).sum() * anchors[0]
    candidates = candidates - 0.5 * anchors[0]
    return anchors, strata, candidates, torch.rand(6, 9) < 0.3


@pytest.mark.parametrize("beta", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.4])
def test_against_loops(tensors, tau_plus, temperature, beta):
    anchors, strata, candidates, excluded = tensors
    mass = debiased_negative_mass(tau_plus, temperature, beta)
    ours = contrastive_loss(anchors, strata, candidates, temperature, excluded, mass)
    expected, bounded = loop_oracle(*tensors, tau_plus, temperature, beta)
    assert ours.item() == pytest.approx(expected, rel=1e-10)
    assert (0 < bounded < 18) == (tau_plus > 0)  # both terms of the maximum occur


def test_without_correction_it_is_the_plain_sum(tensors):
    anchors, strata, candidates, excluded = tensors
    plain = contrastive_loss(anchors, strata, candidates, 0.3, excluded)
    mass = debiased_negative_mass(0.0, 0.3)
    assert torch.equal(contrastive_loss(anchors, strata, candidates, 0.3, excluded, mass), plain)


def test_excluded_candidates_might_as_well_not_be_there(tensors):
    anchors, strata, candidates, _ = tensors
    excluded = torch.zeros(6, 9, dtype=torch.bool)
    excluded[:, 4:] = True
    mass = debiased_negative_mass(0.1, 0.5, 1.0)
    torch.testing.assert_close(
        contrastive_loss(anchors, strata, candidates, 0.5, excluded, mass),
        contrastive_loss(anchors, strata, candidates[:4], 0.5, None, mass),
    )


def test_each_stratum_has_its_own_mass():
    positives, negatives = torch.tensor([[0.5, -0.5]]), torch.tensor([[0.0, 0.2, 0.1]])
    mass = debiased_negative_mass(0.1, 1.0)
    assert mass(positives, negatives).shape == (1, 2)
    assert mass(positives, negatives)[0, 0] < mass(positives, negatives)[0, 1]
    assert debiased_negative_mass(0.0, 1.0)(positives, negatives).shape == (1, 1)


def test_harder_negatives_amount_to_more():
    positives, negatives = torch.tensor([[0.5]]), torch.tensor([[0.0, 0.9, -0.4]])
    masses = [debiased_negative_mass(0.1, 1.0, beta)(positives, negatives) for beta in (0, 0.5, 1, 6, 100)]
    assert all(easier < harder for easier, harder in zip(masses, masses[1:]))
    hardest = (3 * math.exp(0.9) - 0.3 * math.exp(0.5)) / 0.9  # all K as hard as the hardest
    assert masses[-1].item() == pytest.approx(math.log(hardest), rel=1e-5)


def test_where_the_bound_holds_no_gradient_reaches_the_negatives():
    positives = torch.tensor([[1.0]], requires_grad=True)
    negatives = torch.tensor([[-1.0, -0.9, float("-inf")]], requires_grad=True)
    mass = debiased_negative_mass(0.1, 1.0)(positives, negatives)
    assert mass.item() == pytest.approx(math.log(2) - 1)
    for gradient in torch.autograd.grad(mass.sum(), (positives, negatives)):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_more_candidates_than_half_precision_counts():
    logits = torch.zeros(1, 70_000, dtype=torch.float16)
    mass = debiased_negative_mass(0.1, 1.0, 1.0)(logits[:, :1], logits)
    assert mass.item() == pytest.approx(math.log(70_000), rel=1e-5)


def test_a_difference_far_below_zero_has_a_gradient():
    positives, negatives = (torch.tensor([[x]], requires_grad=True) for x in (60.0, -60.0))
    mass = debiased_negative_mass(0.1, 1 / 60)(positives, negatives)
    assert mass.item() == pytest.approx(-60)
    gradients = torch.autograd.grad(mass, (positives, negatives))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.03, 0.07])
@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_extremes_stay_finite_to_the_second_derivative(dtype, temperature, beta):
    torch.manual_seed(0)
    z = torch.randn(4, 8)
    # equal views, opposite ones, and two images with the same projection
    cases = [[z, z], [z, -z], [torch.cat([z[:2], z[:2]]), z]]
    for case in cases:
        views = [view.to(dtype).requires_grad_() for view in case]
        strata = [view[:, None] for view in views]
        mass = debiased_negative_mass(0.1, temperature, beta)
        loss = backdoor_adjusted_loss(views, strata, temperature, None, mass)
        first = torch.autograd.grad(loss, views, create_graph=True)
        second = torch.autograd.grad(sum(g.float().pow(2).sum() for g in first), views)
        assert all(x.isfinite().all() for x in (loss, *first, *second))


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_second_derivative(tensors, beta):
    anchors, strata, candidates, excluded = tensors
    inputs = [x.clone().requires_grad_() for x in (anchors[:3], strata[:3, :2], candidates[:4])]
    mass = debiased_negative_mass(0.1, 0.5, beta)

    def loss(a, s, c):
        return contrastive_loss(a, s, c, 0.5, excluded[:3, :4], mass)

    assert torch.autograd.gradcheck(loss, inputs) and torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.0, 0.5), r"tau_plus must be in \[0, 1\), got 1.0"),
        ((-0.1, 0.5), r"tau_plus must be in \[0, 1\)"),
        ((0.1, 0.0), "temperature must be > 0"),
        ((0.1, 0.5, -1.0), "beta must be >= 0"),
    ],
)
def test_wrong_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        debiased_negative_mass(*arguments)
