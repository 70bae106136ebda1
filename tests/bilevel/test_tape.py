"""Forward mode that reuses what an earlier pass has computed."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.overrides import TorchFunctionMode

from metamask_plugin.bilevel import Functional, Tape
from metamask_plugin.bilevel.tape import LAYERS, Kept, Moments


class Calls(TorchFunctionMode):
    """Counts convolutions and linear layers."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.count += func in LAYERS
        return func(*args, **(kwargs or {}))


def tangent(function, params, direction, x, tape=None):
    with torch.no_grad(), forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(param, direction[name]) for name, param in params.items()}
        if tape is None:
            return forward_ad.unpack_dual(function(duals, x)).tangent
        with tape.replaying():
            return forward_ad.unpack_dual(function(duals, x)).tangent


class Residual(nn.Module):
    """The first convolution's output is changed in place: what was recorded of it is no longer true."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        y = self.first(x)
        y += x
        return self.second(torch.relu_(y)).mean((2, 3))


NETWORKS = {
    "convolutions": (
        nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.Conv2d(8, 8, 3, groups=4, dilation=2),
            nn.Tanh(),
            nn.Flatten(),
            nn.LazyLinear(5),
        ),
        (4, 3, 14, 14),
    ),
    "one dimension": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.Tanh(), nn.Conv1d(4, 2, 2)), (4, 3, 9)),
    "three dimensions": (nn.Sequential(nn.Conv3d(2, 3, 2), nn.Tanh(), nn.Conv3d(3, 2, 2)), (2, 2, 4, 4, 4)),
    "tokens": (nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)), (4, 5, 6)),
    "in place": (Residual(), (4, 3, 6, 6)),
}


def assert_same_tangent(network, x, tolerance):
    """Of a pass that was recorded and of plain forward mode."""
    function, tape = Functional(network), Tape()
    direction = {key: torch.randn_like(param) for key, param in function.params.items()}
    with tape.recording():
        function(function.params, x)
    torch.testing.assert_close(
        tangent(function, function.params, direction, x, tape),
        tangent(function, function.params, direction, x),
        rtol=tolerance,
        atol=tolerance,
    )


@pytest.mark.parametrize("name", NETWORKS)
def test_the_tangent_is_that_of_plain_forward_mode(double, name):
    torch.manual_seed(0)
    network, shape = NETWORKS[name]
    network, x = network.double(), torch.randn(shape)
    network(x)
    assert_same_tangent(network, x, 1e-12)


def test_frozen_parameters_have_no_tangent_and_cost_nothing(double):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    network[0].requires_grad_(False)
    network[4].requires_grad_(False)
    function, tape, x = Functional(network), Tape(), torch.randn(4, 6)
    direction = {key: torch.randn_like(param) for key, param in function.params.items()}
    with tape.recording():
        function(function.params, x)
    with Calls() as calls:
        reused = tangent(function, function.params, direction, x, tape)
    torch.testing.assert_close(reused, tangent(function, function.params, direction, x))
    # nothing enters the first layer, only dW the second, only dx the third
    assert calls.count == 0 + 1 + 1


def test_a_layer_in_the_middle_takes_two_products():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3))
    function, tape, x = Functional(network), Tape(), torch.randn(2, 3, 8, 8)
    with tape.recording():
        function(function.params, x)
    with Calls() as calls:
        tangent(function, function.params, function.params, x, tape)
    assert calls.count == 1 + 2  # the image has no tangent


def test_products_follow_the_recorded_precision():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    function, tape, x = Functional(network), Tape(), torch.randn(4, 3, 8, 8)
    direction = {key: torch.randn_like(param) for key, param in function.params.items()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), tape.recording():
        function(function.params, x)
    assert [type(kept) for kept in tape.kept] == [Kept, Moments, Kept]
    assert {kept.output.dtype for kept in tape.kept[::2]} == {torch.bfloat16}
    low, full = (tangent(function, function.params, direction, x, tape=t) for t in (tape, None))
    assert (low.dtype, full.dtype) == (torch.bfloat16, torch.float32)
    error = (low - full).norm() / full.norm()
    assert 1e-4 < error < 3e-2  # bfloat16 was used, and no more was lost than it costs


class Assigned(nn.Module):
    """A float32 product is assigned to a part of a bfloat16 tensor."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)
        self.scale = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x):
        y = self.first(x).clone()
        y[:, 3:] = (y * self.scale)[:, 3:] * 2
        return self.second(y)


def test_an_assignment_to_a_part_is_not_lost():
    torch.manual_seed(0)
    function, tape, x = Functional(Assigned()), Tape(), torch.randn(4, 3, 8, 8)
    direction = {key: torch.randn_like(param) for key, param in function.params.items()}
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False), tape.recording():
        function(function.params, x)
    low, full = (tangent(function, function.params, direction, x, tape=t) for t in (tape, None))
    assert (low - full).norm() / full.norm() < 3e-2


BATCH_NORMS = {
    "1d": (nn.BatchNorm1d(6), (5, 6)),
    "1d, a sequence": (nn.BatchNorm1d(6), (5, 6, 7)),
    "3d": (nn.BatchNorm3d(6), (3, 6, 2, 2, 2)),
    "not affine": (nn.BatchNorm2d(6, affine=False), (4, 6, 3, 3)),
    "no running statistics": (nn.BatchNorm2d(6, track_running_stats=False), (4, 6, 3, 3)),
    "eps": (nn.BatchNorm2d(6, eps=0.3), (4, 6, 3, 3)),
}


@pytest.mark.parametrize("frozen", [(), ("weight",), ("bias",), ("weight", "bias")])
@pytest.mark.parametrize("has_tangent", [True, False])
@pytest.mark.parametrize("name", BATCH_NORMS)
def test_batch_norm_of_every_kind(double, name, has_tangent, frozen):
    torch.manual_seed(0)
    norm, shape = copy.deepcopy(BATCH_NORMS[name])
    before = [nn.Conv1d(6, 6, 1), nn.Conv1d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv3d(6, 6, 1)][len(shape) - 2]
    network = nn.Sequential(before if len(shape) > 2 else nn.Linear(6, 6), norm, nn.Tanh(), nn.Flatten())
    network = nn.Sequential(*network, nn.LazyLinear(3)).double()
    x = torch.randn(shape)
    network(x)
    network[0].requires_grad_(has_tangent)
    for parameter in frozen:
        if getattr(norm, parameter) is not None:
            getattr(norm, parameter).requires_grad_(False)
    assert_same_tangent(network, x, 1e-11)


def test_recording_leaves_running_statistics_as_without():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten())
    other, x = copy.deepcopy(network), torch.randn(4, 3, 6, 6)
    with Tape().recording():
        network(x)
    other(x)
    assert all(torch.equal(a, b) for a, b in zip(network.buffers(), other.buffers()))
    with pytest.raises(ValueError, match="more than 1 value per channel"), Tape().recording():
        nn.BatchNorm1d(6)(torch.randn(1, 6))


@pytest.mark.parametrize(("layers", "message"), [(1, "fewer"), (3, "more")])
def test_another_pass_than_the_recorded_one_is_refused(layers, message):
    recorded = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    other = nn.Sequential(*[nn.Linear(4, 4) for _ in range(layers)])
    tape, x = Tape(), torch.randn(2, 4)
    with tape.recording():
        recorded(x)
    function = Functional(other)
    with pytest.raises(RuntimeError, match=message):
        tangent(function, function.params, function.params, x, tape)


def test_an_output_of_another_shape_is_refused():
    tape = Tape()
    with tape.recording():
        nn.Linear(4, 3)(torch.randn(2, 4))
    function = Functional(nn.Linear(4, 5))
    with pytest.raises(RuntimeError, match=r"recorded an output of shape \(2, 3\)"):
        tangent(function, function.params, function.params, torch.randn(2, 4), tape)
