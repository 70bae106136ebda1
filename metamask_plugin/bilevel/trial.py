"""The trial step: from weights and the inner gradient to trial weights."""

import copy
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch

from metamask_plugin.bilevel.params import Params


class TrialStep(Protocol):
    """One gradient step on one group of parameters, linear in the gradient.

    Attributes:
        lr: l, its length.
    """

    lr: float | torch.Tensor

    def step(self, params: Params, grads: Params) -> Params:
        """Returns the trial weights; differentiable in ``grads``, changes nothing in place."""

    def pull_back(self, cotangent: Params) -> Params:
        """Returns u with <u, dg> = -<cotangent, d step(params, g)>: what a change of g costs."""

    def of_length(self, lr: float | torch.Tensor) -> "TrialStep":
        """Returns the same step with another l."""


class PlainStep:
    """A plain gradient step, theta' = theta - l * g. MetaMask Eq. (7) [0].

    Args:
        lr: l >= 0; a scalar tensor may change between two replays of a :class:`CudaGraph`.
        scale: factors on l of single parameters, by name, where the optimiser has several rates.

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    """

    def __init__(self, lr: float | torch.Tensor, scale: Mapping[str, float] = MappingProxyType({})):
        if not isinstance(lr, torch.Tensor) and lr < 0:
            raise ValueError(f"PlainStep: lr must be >= 0, got {lr}")
        self.lr, self.scale = lr, scale

    def length(self, name: str) -> float | torch.Tensor:
        """l of one parameter."""
        return self.lr * self.scale[name] if name in self.scale else self.lr

    def step(self, params: Params, grads: Params) -> Params:
        return {name: param - self.length(name) * grads[name] for name, param in params.items()}

    def pull_back(self, cotangent: Params) -> Params:
        return {name: self.length(name) * v for name, v in cotangent.items()}

    def of_length(self, lr: float | torch.Tensor) -> "PlainStep":
        """The same step with another l."""
        step = copy.copy(self)
        step.lr = lr
        return step


class MomentumStep(PlainStep):
    """The step that SGD with momentum and weight decay would make, as in MetaMask's release [0].

        theta' = theta - l * (momentum * buffer + g + weight_decay * theta)

    The buffer and the decay do not depend on w, so the gradient of theta' with respect to w is that
    of the plain step; only the point at which the outer loss is taken differs.

    Args:
        lr: l >= 0.
        momentum: the optimiser's momentum.
        weight_decay: the optimiser's weight decay, or that of each parameter by name.
        buffers: momentum buffers by parameter name; a missing one counts as the optimiser's first step, one
            too many is not used.

    [0] https://github.com/lionellee9089/MetaMask
    """

    def __init__(
        self,
        lr: float,
        momentum: float,
        weight_decay: float | Mapping[str, float],
        buffers: Params,
        scale: Mapping[str, float] = MappingProxyType({}),
    ):
        super().__init__(lr, scale)
        self.momentum, self.weight_decay, self.buffers = momentum, weight_decay, buffers

    def step(self, params: Params, grads: Params) -> Params:
        decay = self.weight_decay
        decay = decay if isinstance(decay, Mapping) else dict.fromkeys(params, decay)
        descent = {name: grads[name] + decay[name] * param for name, param in params.items()}
        for name in params.keys() & self.buffers.keys():
            descent[name] = descent[name] + self.momentum * self.buffers[name]
        return super().step(params, descent)


class Trial(NamedTuple):
    """The trial steps of both groups; the papers let their learning rates differ."""

    encoder: TrialStep
    head: TrialStep
