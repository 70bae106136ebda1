"""Trial steps that follow an optimiser: the step it would make, held linear, and exact through it."""

import pytest
import torch
from method_config import icl_msr_config, method_config

from metamask_plugin.bilevel import (
    AdamStep,
    Exact,
    InnerStep,
    MatchedStep,
    MomentumStep,
    Permuted,
    PlainStep,
    TrustRatioStep,
    Unrolled,
)
from metamask_plugin.methods import ICLMSR, MetaMask


def adam(params):
    """Two counts of steps, and one parameter without state, as of a layer that was frozen so far."""
    moments = {name: torch.rand_like(p).pow(2) * 1e-4 for name, p in params.items()}
    if len(moments) > 1:
        moments.pop(next(iter(moments)))
    which = {name: place % 2 for place, name in enumerate(moments)}
    return AdamStep(1e-3, moments, (0.3, 0.1, 0.05), 0.99, 1e-8, {}, which)


def trust_ratio(params):
    adapted = {name: 1e-3 for name, p in params.items() if p.ndim > 1}
    return TrustRatioStep(0.3, adapted, dict.fromkeys(params, 1e-2), clip=False)


def clipped(params):
    return TrustRatioStep(1e-4, dict.fromkeys(params, 1e-3), dict.fromkeys(params, 0.0), clip=True)


def matched(params):
    return MatchedStep(adam(params), 0.1)


def momentum(params):
    return MomentumStep(0.1, 0.9, 1e-4, {name: torch.randn_like(p) for name, p in params.items()})


STEPS = [adam, trust_ratio, clipped, matched, momentum]


def problem(method):
    torch.manual_seed(0)
    views = [torch.randn(6, 3, 16, 16) for _ in range(2)]
    if method == "metamask":
        return MetaMask(method_config(crop_size=16)).meta_problem(views)
    model = ICLMSR(icl_msr_config(crop_size=16))
    return model.meta_problem(views, model.regularizer(torch.randn(6, 3, 20, 20)).detach())


@pytest.mark.parametrize("method", ["metamask", "icl_msr"])
@pytest.mark.parametrize(
    ("make", "weight", "clip"),
    [(adam, 3.0, None), (adam, 3.0, 0.1), (trust_ratio, 10.0, None), (clipped, 1.0, None)]
    + [(matched, 3.0, 0.1), (momentum, 1.0, None)],
)
def test_exact_equals_unrolled(double, make, weight, clip, method):
    bilevel = problem(method)
    trial = InnerStep(make(bilevel.encoder_params), make(bilevel.head_params), weight, clip)
    exact, oracle = Exact().gradient(bilevel, trial), Unrolled().gradient(bilevel, trial)
    error = (exact.outer_params[0] - oracle.outer_params[0]).norm() / oracle.outer_params[0].norm()
    assert error < 1e-10
    for ours, theirs in zip(exact[1:], oracle[1:]):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", STEPS)
def test_a_step_pulls_back_what_it_pushes_forward(double, make):
    """<cotangent, d step> = -<vjp(cotangent), dg>, and a step is linear in the gradient."""
    torch.manual_seed(0)
    params = {"weight": torch.randn(4, 3), "bias": torch.randn(4), "norm": torch.randn(4)}
    grads, change, cotangent = ({k: torch.randn_like(p) for k, p in params.items()} for _ in range(3))
    step = make(params).at(params, grads)
    moved = {k: step.step(params, {n: g + change[n] for n, g in grads.items()})[k] for k in params}
    pushed = sum(((moved[k] - step.step(params, grads)[k]) * cotangent[k]).sum() for k in params)
    pulled = sum((step.vjp(cotangent)[k] * change[k]).sum() for k in params)
    torch.testing.assert_close(pushed, -pulled)


def test_what_a_trial_step_gains_and_how_long_it_is(double):
    bilevel = problem("icl_msr")
    trial = InnerStep(PlainStep(0.1), PlainStep(0.2))
    found = Exact().gradient(bilevel, trial)
    weights, before, after = [], [], []
    with torch.no_grad():
        h = bilevel.encode(bilevel.encoder_params)
        at_the_weights = bilevel.outer_loss(h, bilevel.head_params, bilevel.outer_params)
    for w in (bilevel.encoder_params, bilevel.head_params):
        weights += [p.detach().requires_grad_() for p in w.values()]
    named = dict(zip([*bilevel.encoder_params, *bilevel.head_params], weights))
    theta = {name: named[name] for name in bilevel.encoder_params}
    phi = {name: named[name] for name in bilevel.head_params}
    inner = bilevel.inner_loss(bilevel.encode(theta), phi, bilevel.outer_params)
    for p, g in zip(weights, torch.autograd.grad(inner, weights, materialize_grads=True)):
        length = 0.1 if any(p is q for q in theta.values()) else 0.2
        before.append(p.detach().flatten())
        after.append((p.detach() - length * g).flatten())
    before, after = torch.cat(before), torch.cat(after)
    torch.testing.assert_close(found.gain, at_the_weights - found.outer_loss)
    torch.testing.assert_close(found.relative_length, (after - before).norm() / before.norm())


def test_where_both_losses_are_one_the_gain_is_their_difference(double):
    bilevel = problem("metamask")
    found = Exact().gradient(bilevel, InnerStep(PlainStep(0.01), PlainStep(0.01)))
    assert found.gain == found.inner_loss - found.outer_loss > 0


def test_a_matched_step_has_its_share_of_the_other_ones_length(double):
    torch.manual_seed(0)
    params = {"a": torch.randn(5, 4), "b": torch.randn(5)}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    other = AdamStep(1e-2, {name: torch.rand_like(p) for name, p in params.items()}, (0.5,))

    def moved(step):
        trial = step.at(params, grads).step(params, grads)
        return torch.cat([(params[name] - trial[name]).flatten() for name in params])

    step = moved(MatchedStep(other, 0.25))
    torch.testing.assert_close(step.norm(), 0.25 * moved(other).norm())
    direction = torch.cat([g.flatten() for g in grads.values()])
    torch.testing.assert_close(step / step.norm(), direction / direction.norm())
    still = {name: torch.zeros_like(g) for name, g in grads.items()}
    stayed = MatchedStep(other).at(params, still).step(params, still)
    assert all(torch.equal(stayed[name], p) for name, p in params.items())


def test_numbers_are_what_changes_between_two_replays():
    step = AdamStep(0.1, {"a": torch.full((2,), 4.0)}, (0.5, 0.1), beta2=1.0, eps=0.0, which={"a": 0})
    params = grads = {"a": torch.ones(2)}
    again = step.with_numbers(0.2, 1.0, 0.1)
    assert step.numbers == (0.1, 0.5, 0.1) and again.numbers == (0.2, 1.0, 0.1)
    for one, moved in ((step, 0.1 / (2 / 0.5)), (again, 0.2 / 2)):
        torch.testing.assert_close(
            one.at(params, grads).step(params, grads)["a"], torch.full((2,), 1 - moved)
        )
    matched = MatchedStep(step, 0.5).with_numbers(*again.numbers)
    assert matched.numbers == again.numbers and matched.share == 0.5


@pytest.mark.parametrize("step", [lambda: PlainStep(-1.0), lambda: AdamStep(-1.0, {}, ())])
def test_a_negative_length_is_refused(step):
    with pytest.raises(ValueError, match=r"Step: lr must be >= 0, got -1.0"):
        step()
    with pytest.raises(ValueError, match=r"Permuted: seed must be a whole number, got \[1\]"):
        Permuted([1])
    with pytest.raises(ValueError, match=r"MatchedStep: share must be >= 0, got -0.1"):
        MatchedStep(PlainStep(0.1), -0.1)


def test_a_permuted_meta_gradient_is_as_long_and_belongs_to_other_dimensions(double):
    bilevel, trial = problem("metamask"), InnerStep(PlainStep(0.1), PlainStep(0.1))
    exact = Exact().gradient(bilevel, trial)
    permuted, again, other = (Permuted(seed).gradient(bilevel, trial) for seed in (0, 0, 1))
    assert torch.equal(permuted.outer_params[0].sort().values, exact.outer_params[0].sort().values)
    assert torch.equal(permuted.outer_params[0], again.outer_params[0])
    assert not torch.equal(permuted.outer_params[0], other.outer_params[0])
    assert (permuted.outer_params[0] == exact.outer_params[0]).float().mean() < 0.1
    assert permuted[1:] == exact[1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matched_length_is_not_lost_in_the_weights_digits(dtype):
    torch.manual_seed(0)
    params, grads = ({"w": (size * torch.randn(64, 64)).to(dtype)} for size in (1.0, 1e-6))
    length = MatchedStep(PlainStep(1e-2), 0.02).at(params, grads).lr
    torch.testing.assert_close(length.float(), torch.tensor(2e-4), rtol=1e-2, atol=0)
