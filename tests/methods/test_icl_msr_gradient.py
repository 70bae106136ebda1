"""ICL-MSR's meta-gradient through real networks, in float64, against the unrolled oracle."""

from dataclasses import replace

import pytest
import torch
from method_config import icl_msr_config

from metamask_plugin.bilevel import Exact, FirstOrder, InnerStep, MomentumStep, PlainStep, Unrolled
from metamask_plugin.methods import ICLMSR
from metamask_plugin.methods.interventional import LEVELS

TRIAL = InnerStep(PlainStep(0.1), PlainStep(0.1))
CASES = [
    *[("conv4", 32, level) for level in LEVELS],
    *[("conv", 32, level) for level in LEVELS],
    *[("fc", 32, level) for level in LEVELS],  # its fully connected layers lie behind the map
    *[("resnet18", 16, level) for level in LEVELS],
    pytest.param("resnet50", 16, "features", marks=pytest.mark.slow),
    ("test_convnext", 32, "feature_map"),
    ("test_vit", 32, "features"),
    ("test_vit", 32, "projection"),
]


def setting(backbone="conv4", size=32, batch=6, gamma=0.0, **overrides):
    """An ICL-MSR, an A well off its flat start, and their problem on one batch of noise.

    Without the uniformity term unless asked for: it is the same for every estimator, and large, and
    would hide an error in the contrastive part.
    """
    torch.manual_seed(0)
    model = ICLMSR(icl_msr_config(backbone, size, method_kwargs__gamma=gamma, **overrides))
    views = [torch.randn(batch, 3, size, size) for _ in range(2)]
    weights = torch.sigmoid(2 * torch.randn(batch, model.regularizer.n, model.regularizer.channels))
    return model, model.meta_problem(views, weights)


def relative_error(result, oracle):
    ours, truth = result.outer_params[0], oracle.outer_params[0]
    return ((ours - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize(("backbone", "size", "level"), CASES)
def test_exact_equals_unrolled(double, backbone, size, level):
    _, problem = setting(backbone, size, method_kwargs__level=level)
    oracle, exact = Unrolled().gradient(problem, TRIAL), Exact().gradient(problem, TRIAL)
    assert oracle.outer_params[0].norm() > 0
    assert relative_error(exact, oracle) < 1e-10
    assert exact.inner_loss.item() == pytest.approx(oracle.inner_loss.item(), rel=1e-12)
    assert exact.outer_loss.item() == pytest.approx(oracle.outer_loss.item(), rel=1e-10)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scope", ["image", "batch"])
def test_with_uniformity_as_well(double, level, scope):
    overrides = {"method_kwargs__level": level, "method_kwargs__uniformity__scope": scope}
    model, problem = setting(gamma=2.0, **overrides)
    _, without = setting(**overrides)
    full, contrastive = (Exact().gradient(p, TRIAL) for p in (problem, without))
    assert relative_error(full, Unrolled().gradient(problem, TRIAL)) < 1e-10
    weights = problem.outer_params[0].clone().requires_grad_()
    (direct,) = torch.autograd.grad(2.0 * model._uniformity(weights), weights)
    torch.testing.assert_close(full.outer_params[0] - contrastive.outer_params[0], direct)


@pytest.mark.parametrize("level", LEVELS)
def test_without_uniformity_all_of_it_is_second_order(double, level):
    """A does not enter L_ct at the trial weights but through them: Eq. (8)."""
    _, problem = setting(method_kwargs__level=level)
    assert FirstOrder().gradient(problem, TRIAL).outer_params[0].abs().max() == 0


@pytest.mark.parametrize("level", LEVELS)
def test_against_finite_differences_of_the_outer_loss(double, level):
    _, problem = setting(gamma=1.0, method_kwargs__level=level)
    gradient = Exact().gradient(problem, TRIAL).outer_params[0]
    direction, eps = torch.randn_like(gradient), 1e-6

    def outer(step):
        w = problem.outer_params[0] + step * direction
        moved = replace(problem, outer_params=(w,))
        return Unrolled().gradient(moved, TRIAL).outer_loss

    slope = (outer(eps) - outer(-eps)) / (2 * eps)
    assert (gradient * direction).sum().item() == pytest.approx(slope.item(), rel=1e-5)


def test_exact_with_a_momentum_trial(double):
    _, problem = setting("fc", method_kwargs__level="feature_map")
    steps = [
        MomentumStep(0.1, 0.9, 5e-4, {name: torch.randn_like(p) for name, p in params.items()})
        for params in (problem.encoder_params, problem.head_params)
    ]
    oracle = Unrolled().gradient(problem, InnerStep(*steps))
    assert relative_error(Exact().gradient(problem, InnerStep(*steps)), oracle) < 1e-10


def test_what_lies_behind_the_map_takes_the_trial_step_with_the_head(double):
    model, problem = setting("fc", method_kwargs__level="feature_map")
    assert {name for name in problem.head_params if name.startswith("tail.")} == {
        f"tail.network.fc.{name}" for name, _ in model.backbone.fc.named_parameters()
    }
    assert not any(".fc." in name for name in problem.encoder_params)


def test_without_lambda_a_has_no_say(double):
    _, problem = setting(method_kwargs__lamb=0.0)
    for estimator in (Exact(), Unrolled()):
        assert estimator.gradient(problem, TRIAL).outer_params[0].abs().max() == 0


@pytest.mark.parametrize("level", LEVELS)
def test_nothing_is_touched(level):
    model, problem = setting(method_kwargs__level=level)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rng = torch.get_rng_state()
    Exact().gradient(problem, TRIAL)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)
