"""The release's algorithm, told again, is what it is compared as."""

import copy

import pytest
import torch
from common import build_model, noise_views
from loop import Loop
from method_config import method_config
from peers import PEERS, UNIT, Release

from metamask_plugin.bilevel import FiniteDifference, InnerStep, MomentumStep, PlainStep
from metamask_plugin.methods import MetaMask


def setting():
    torch.manual_seed(0)
    model = MetaMask(method_config())
    model.mask.weight.data += 0.3 * torch.randn_like(model.mask.weight)
    problem = model.meta_problem([torch.randn(6, 3, 32, 32) for _ in range(2)])
    return model, problem


def momentum(params):
    return MomentumStep(0.1, 0.9, 5e-4, {name: torch.randn_like(param) for name, param in params.items()})


@pytest.mark.parametrize("plain", [False, True])
def test_release_is_the_finite_difference_with_its_trial_step(double, plain):
    model, problem = setting()
    groups = problem.encoder_params, problem.head_params
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1)) if plain else InnerStep(*map(momentum, groups))
    release = Release(model.redundancy_head)
    ours = FiniteDifference(1e-2).gradient(problem, trial)
    for _ in range(2):  # the second network is there already the second time
        found = release.gradient(problem, trial)
        torch.testing.assert_close(found.outer_params[0], ours.outer_params[0], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(found.inner_loss, ours.inner_loss)
        torch.testing.assert_close(found.outer_loss, ours.outer_loss)


def test_release_leaves_the_live_network_and_its_buffers_alone(double):
    model, problem = setting()
    before = copy.deepcopy(model.state_dict())
    trial = InnerStep(momentum(problem.encoder_params), momentum(problem.head_params))
    buffers = [copy.deepcopy(step.buffers) for step in trial[:2]]
    Release(model.redundancy_head).gradient(problem, trial)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    for step, kept in zip(trial[:2], buffers):
        assert all(torch.equal(step.buffers[name], buffer) for name, buffer in kept.items())


def test_release_has_one_learning_rate():
    model, problem = setting()
    with pytest.raises(ValueError, match="one learning rate"):
        Release().gradient(problem, InnerStep(PlainStep(0.1), PlainStep(0.2)))


@pytest.mark.parametrize("name", PEERS)
def test_peers_train_and_have_no_mask_to_learn(name):
    torch.manual_seed(0)
    model = build_model("conv4", 32, **PEERS[name])
    loop = Loop(model, noise_views(4, 32))
    start = {key: value.clone() for key, value in model.state_dict().items()}
    loop.cycle()
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, start[key])}
    assert any(key.startswith("backbone.") for key in moved)
    assert any(key.startswith("redundancy_head.") for key in moved) == (name == UNIT)
    assert not any(key.startswith("mask.") for key in moved)
    assert loop.meta_every == 0
