import copy

import pytest
import torch
from torch import nn

from metamask_plugin.tasks.base import TargetNetwork, cosine_momentum


def networks():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), nn.Linear(4, 2)


def moved(*modules):
    """Stands for an optimiser step."""
    for module in modules:
        for param in module.parameters():
            param.data += torch.randn_like(param)


def values(*modules):
    return [param.detach().clone() for module in modules for param in module.parameters()]


def test_starts_as_a_copy_that_shares_nothing():
    trunk, head = networks()
    target = TargetNetwork(trunk, head)
    start = values(trunk, head)
    torch.testing.assert_close(values(target.trunk, target.head), start, rtol=0, atol=0)
    moved(trunk, head)
    torch.testing.assert_close(values(target.trunk, target.head), start, rtol=0, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
def test_two_updates_by_hand(double, momentum):
    trunk, head = networks()
    target = TargetNetwork(trunk, head)
    xi = values(trunk, head)
    for _ in range(2):
        moved(trunk, head)
        online = values(trunk, head)
        target.update(trunk, head, momentum)
        xi = [momentum * mine + (1 - momentum) * theta for mine, theta in zip(xi, online)]
        torch.testing.assert_close(values(trunk, head), online, rtol=0, atol=0)
    torch.testing.assert_close(values(target.trunk, target.head), xi)


def test_momentum_zero_takes_the_online_weights_and_one_keeps_its_own():
    trunk, head = networks()
    target = TargetNetwork(trunk, head)
    start = values(trunk, head)
    moved(trunk, head)
    target.update(trunk, head, 1.0)
    torch.testing.assert_close(values(target.trunk, target.head), start, rtol=0, atol=0)
    target.update(trunk, head, 0.0)
    torch.testing.assert_close(values(target.trunk, target.head), values(trunk, head), rtol=0, atol=0)


def test_never_requires_a_gradient_but_passes_one_to_its_input():
    trunk, head = networks()
    target = TargetNetwork(trunk, head)
    target.update(trunk, head, 0.5)
    assert not any(param.requires_grad for param in target.parameters())
    assert all(param.requires_grad for module in (trunk, head) for param in module.parameters())
    x = torch.randn(5, 3, requires_grad=True)
    target.head(target.trunk(x)).square().sum().backward()
    assert x.grad.abs().sum() > 0


def test_running_statistics_are_its_own():
    trunk, head = networks()
    target = TargetNetwork(trunk, head)
    start = copy.deepcopy(trunk[1].state_dict())
    trunk(torch.randn(5, 3) + 7)
    target.update(trunk, head, 0.5)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(target.trunk[1].state_dict()[name], start[name])
        assert not torch.equal(trunk[1].state_dict()[name], start[name])
    target.trunk(torch.randn(5, 3))
    assert target.trunk[1].num_batches_tracked == 1
    assert not torch.equal(target.trunk[1].running_mean, start["running_mean"])


@pytest.mark.parametrize(
    ("progress", "expected"), [(0.0, 0.99), (0.5, 0.995), (1.0, 1.0), (1 / 3, 0.9925), (2 / 3, 0.9975)]
)
def test_cosine_momentum(progress, expected):
    assert cosine_momentum(0.99, 1.0, progress) == pytest.approx(expected, abs=1e-12)


def test_constant_momentum():
    assert [cosine_momentum(0.9, 0.9, progress) for progress in (0.0, 0.3, 1.0)] == [0.9] * 3
