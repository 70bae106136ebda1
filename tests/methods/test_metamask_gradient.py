"""The meta-gradient through real networks, in float64, against the unrolled oracle."""

import dataclasses

import pytest
import torch
from method_config import method_config
from method_training import shared_pass
from torch import nn

from metamask_plugin.bilevel import (
    BilevelProblem,
    Exact,
    FiniteDifference,
    FirstOrder,
    Functional,
    InnerStep,
    MomentumStep,
    PlainStep,
    Unrolled,
)
from metamask_plugin.methods import MetaMask

ENCODERS = [
    ("conv4", 32),
    ("conv", 32),
    ("conv", 64),
    ("fc", 32),
    ("fc", 64),
    ("resnet18", 16),
    pytest.param("resnet50", 16, marks=pytest.mark.slow),
    ("test_convnext", 32),
    ("test_vit", 32),
]


def setting(backbone="conv4", size=32, batch=6, **overrides):
    """A MetaMask with a mask off its starting point, and its problem on one batch of noise."""
    torch.manual_seed(0)
    model = MetaMask(method_config(backbone, size, **overrides))
    for parameter in model.mask.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    views = [torch.randn(batch, 3, size, size) for _ in range(2)]
    return model, views, model.meta_problem(views)


def relative_error(result, oracle):
    ours, truth = result.outer_params[0], oracle.outer_params[0]
    return ((ours - truth).norm() / truth.norm()).item()


def cosine(result, oracle):
    return torch.cosine_similarity(result.outer_params[0], oracle.outer_params[0], dim=0).item()


@pytest.mark.parametrize(("backbone", "size"), ENCODERS)
def test_exact_equals_unrolled(double, backbone, size):
    _, _, problem = setting(backbone, size)
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    oracle = Unrolled().gradient(problem, trial)
    exact = Exact().gradient(problem, trial)
    assert relative_error(exact, oracle) < 1e-10
    assert exact.inner_loss.item() == pytest.approx(oracle.inner_loss.item(), rel=1e-12)
    assert exact.outer_loss.item() == pytest.approx(oracle.outer_loss.item(), rel=1e-10)


def test_the_second_order_part_dominates_where_exactness_is_tested(double):
    _, _, problem = setting("conv")
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    # were this near 1, the test above could be passed with the first-order term alone
    assert cosine(FirstOrder().gradient(problem, trial), Unrolled().gradient(problem, trial)) < 0.5


@pytest.mark.parametrize("final_norm", [False, True])
@pytest.mark.parametrize("lr", [1e-3, 1.0])
def test_exact_for_either_head_and_from_short_to_long_steps(double, final_norm, lr):
    _, _, problem = setting(method_kwargs__task_kwargs__final_norm=final_norm, batch=12)
    trial = InnerStep(PlainStep(lr), PlainStep(lr))
    assert relative_error(Exact().gradient(problem, trial), Unrolled().gradient(problem, trial)) < 1e-10


def test_exact_with_the_officials_momentum_trial(double):
    model, _, problem = setting()
    steps = [
        MomentumStep(0.1, 0.9, 5e-4, {name: torch.randn_like(p) for name, p in params.items()})
        for params in (problem.encoder_params, problem.head_params)
    ]
    trial = InnerStep(*steps)
    oracle = Unrolled().gradient(problem, trial)
    assert relative_error(Exact().gradient(problem, trial), oracle) < 1e-10
    plain = Exact().gradient(problem, InnerStep(PlainStep(0.1), PlainStep(0.1)))
    assert relative_error(plain, oracle) > 1e-2


def test_finite_difference_needs_a_small_r(double):
    _, _, problem = setting("conv")
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    oracle = Unrolled().gradient(problem, trial)
    errors = [
        relative_error(FiniteDifference(r).gradient(problem, trial), oracle) for r in (1e-2, 1e-4, 1e-6)
    ]
    assert errors[0] > 0.1 and errors[2] < 1e-4 and errors[0] > errors[1] > errors[2]


def test_a_trial_step_of_length_zero_leaves_the_direct_term(double):
    _, _, problem = setting()
    trial = InnerStep(PlainStep(0.0), PlainStep(0.0))
    mask = problem.outer_params[0].clone().requires_grad_()
    loss = problem.outer_loss(problem.encode(problem.encoder_params), problem.head_params, (mask,))
    (expected,) = torch.autograd.grad(loss, mask)
    for estimator in (Exact(), Unrolled(), FirstOrder(), FiniteDifference()):
        torch.testing.assert_close(estimator.gradient(problem, trial).outer_params[0], expected)


def test_a_mask_of_ones_is_the_unmasked_loss(double):
    model, views, problem = setting()
    h = problem.encode(problem.encoder_params)
    ones = torch.ones_like(problem.outer_params[0])
    expected = model.task(list(h)).loss
    torch.testing.assert_close(problem.inner_loss(h, problem.head_params, (ones,)), expected)


@pytest.mark.parametrize("estimator", [Exact(), Unrolled(), FirstOrder(), FiniteDifference()])
def test_nothing_is_touched(estimator):
    model, views, _ = setting()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    h = model.meta_problem(views).encode(dict(model.backbone.named_parameters()))
    model.task(list(h)).loss.backward()
    optimizer.step()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    buffers = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    rng = torch.get_rng_state()

    estimator.gradient(model.meta_problem(views), InnerStep(PlainStep(0.1), PlainStep(0.1)))

    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for p, grad in zip(model.parameters(), grads):
        assert (p.grad is None and grad is None) or torch.equal(p.grad, grad)
    assert all(torch.equal(s["momentum_buffer"], b) for s, b in zip(optimizer.state.values(), buffers))
    assert torch.equal(torch.get_rng_state(), rng)
    assert model.training and model.backbone.training


def test_exact_under_dropout_sees_one_and_the_same_mask(double):
    torch.manual_seed(0)
    encoder = Functional(nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.Tanh(), nn.Dropout(0.5)))
    head = Functional(nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.2), nn.Tanh()))
    x = torch.randn(5, 3, 2, 2)

    def loss(h, phi, weights):
        return head(phi, h * weights[0]).pow(2).sum()

    problem = BilevelProblem(
        lambda theta: encoder(theta, x), loss, loss, encoder.params, head.params, (torch.rand(8),)
    )
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    assert relative_error(Exact().gradient(problem, trial), Unrolled().gradient(problem, trial)) < 1e-12


def test_sigmoid_mask_gets_the_logits_gradient(double):
    model, _, problem = setting(method_kwargs__mask__parameterisation="sigmoid")
    gradient = torch.randn_like(problem.outer_params[0])
    model.mask.accumulate(gradient)
    logit = model.mask.logit.detach().clone().requires_grad_()
    (expected,) = torch.autograd.grad((torch.sigmoid(logit) * gradient).sum(), logit)
    torch.testing.assert_close(model.mask.logit.grad, expected)


def test_without_a_tape_it_is_the_same_gradient(double):
    _, _, problem = setting("conv")
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    assert (
        relative_error(Exact(reuse=False).gradient(problem, trial), Exact().gradient(problem, trial)) < 1e-12
    )


@pytest.mark.parametrize("estimator", [Exact(), Unrolled(), FirstOrder(), FiniteDifference(1e-6)])
def test_a_frozen_encoder_is_a_trial_step_of_length_zero_there(double, estimator):
    _, _, problem = setting()
    full = estimator.gradient(problem, InnerStep(PlainStep(0.0), PlainStep(0.1)))
    heads = estimator.gradient(problem.frozen_encoder(), InnerStep(PlainStep(0.1), PlainStep(0.1)))
    assert relative_error(heads, full) < (1e-5 if isinstance(estimator, FiniteDifference) else 1e-12)
    assert heads.outer_loss.item() == pytest.approx(full.outer_loss.item(), rel=1e-12)


def test_a_frozen_encoder_is_evaluated_once_and_not_at_all_where_its_features_are_there():
    model, views, problem = setting()
    calls = []
    model.backbone.register_forward_hook(lambda *args: calls.append(1))
    Exact().gradient(problem.frozen_encoder(), InnerStep(PlainStep(0.1), PlainStep(0.1)))
    assert len(calls) == len(views)
    encoded = shared_pass(problem)
    calls.clear()
    Exact().gradient(
        dataclasses.replace(problem, encoded=encoded).frozen_encoder(),
        InnerStep(PlainStep(0.1), PlainStep(0.1)),
    )
    assert not calls


@pytest.mark.parametrize("estimator", [Exact(), FirstOrder(), FiniteDifference(1e-6)])
def test_the_regular_steps_pass_serves_as_the_inner_one(double, estimator):
    model, views, problem = setting()
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    encoded = shared_pass(problem)
    shared = estimator.gradient(dataclasses.replace(problem, encoded=encoded), trial)
    assert relative_error(shared, estimator.gradient(problem, trial)) < 1e-12
    # and the regular step can still differentiate it
    gradient = torch.autograd.grad(encoded.features.sum(), list(encoded.params.values()))
    assert all(torch.isfinite(value).all() for value in gradient)


def test_bf16_in_the_encoder_alone():
    torch.manual_seed(0)
    model = MetaMask(method_config("conv", method_kwargs__meta={"precision": "bf16"}))
    views = [torch.randn(32, 3, 32, 32) for _ in range(2)]
    problem = model.meta_problem(views)
    trial = InnerStep(PlainStep(1e-3), PlainStep(1e-3))
    low = model.meta.estimator.gradient(problem, trial)
    full = Exact().gradient(dataclasses.replace(problem, encode_once=None), trial)
    assert low.outer_params[0].dtype == torch.float32
    assert low.inner_loss.item() != full.inner_loss.item()
    assert low.inner_loss.item() == pytest.approx(full.inner_loss.item(), rel=1e-2)
    assert cosine(low, full) > 0.95


def test_a_share_of_the_batch_is_the_problem_of_those_images(double):
    model, views, problem = setting(batch=8)
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    half = model.meta_problem([x[:4] for x in views])
    assert relative_error(Exact().gradient(half, trial), Unrolled().gradient(half, trial)) < 1e-10
    assert cosine(Exact().gradient(half, trial), Exact().gradient(problem, trial)) < 0.999
