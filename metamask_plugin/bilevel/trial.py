"""The trial step: from weights and the inner gradient to trial weights."""

import copy
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import torch
from torch.nn.utils import get_total_norm

from metamask_plugin.bilevel.params import Params

Number = float | torch.Tensor

CLIP_EPS = 1e-6
"""That of ``torch.nn.utils.clip_grad_norm_``."""


class TrialStep(Protocol):
    """One gradient step on one group of parameters.

    Attributes:
        numbers: what changes from one iteration to the next and is no tensor that is read in place, the
            learning rate first.
        scale: factors on the learning rate, by parameter.
    """

    numbers: tuple[Number, ...]
    scale: Mapping[str, Number]

    def at(self, params: Params, grads: Params) -> "PlainStep":
        """Returns the step as one that is linear in the gradient, all else held fixed.

        Args:
            params: the weights, in no graph.
            grads: the inner gradient, in no graph.
        """

    def with_numbers(self, *numbers: Number) -> "TrialStep":
        """Returns the same step with other :attr:`numbers`."""


class PlainStep:
    """A plain gradient step, theta' = theta - l * g. MetaMask Eq. (7) [0].

    Args:
        lr: l >= 0; a scalar tensor may change between two replays of a :class:`CudaGraph`.
        scale: factors on l of single parameters, by name: of a parameter, or of each of its entries.

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    """

    def __init__(self, lr: Number, scale: Mapping[str, Number] = MappingProxyType({})):
        if not isinstance(lr, torch.Tensor) and lr < 0:
            raise ValueError(f"{type(self).__name__}: lr must be >= 0, got {lr}")
        self.lr, self.scale = lr, scale

    @property
    def numbers(self) -> tuple[Number, ...]:
        return (self.lr,)

    def with_numbers(self, lr: Number) -> "PlainStep":
        step = copy.copy(self)
        step.lr = lr
        return step

    def at(self, params: Params, grads: Params) -> "PlainStep":
        return self

    def times(self, factor: Number, names: Iterable[str]) -> "PlainStep":
        """The same step of ``factor`` times the gradient.

        Args:
            factor: a number, or a scalar tensor.
            names: of the parameters.
        """
        return PlainStep(self.lr, {name: factor * self.scale.get(name, 1.0) for name in names})

    def length(self, name: str) -> Number:
        """l of one parameter."""
        return self.lr * self.scale[name] if name in self.scale else self.lr

    def step(self, params: Params, grads: Params) -> Params:
        """Returns the trial weights; differentiable in ``grads``, changes nothing in place."""
        return {name: param - self.length(name) * grads[name] for name, param in params.items()}

    def pull_back(self, cotangent: Params) -> Params:
        """Returns u with <u, dg> = -<cotangent, d step(params, g)>: what a change of g costs."""
        return {name: self.length(name) * v for name, v in cotangent.items()}


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
        lr: Number,
        momentum: float,
        weight_decay: float | Mapping[str, float],
        buffers: Params,
        scale: Mapping[str, Number] = MappingProxyType({}),
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


class AdamStep(PlainStep):
    """The step that Adam or AdamW would make with this gradient, momentum and weight decay aside.

        theta' = theta - l * p * g,       p = 1 / (sqrt(v') / c + eps)
        v' = beta2 * v + (1 - beta2) * g^2,       c = sqrt(1 - beta2^t)

    v is the optimiser's second moment, and t the number of the step: Algorithm 1 of [0] without the first
    moment. p is that of the inner gradient, and is held fixed where the step is differentiated.

    Args:
        lr: l >= 0.
        second_moments: v, by name; a missing one counts as the optimiser's first step.
        corrections: c, of each number of steps that parameters have made; the last is that of a first step.
        beta2: the optimiser's.
        eps: likewise.
        scale: factors on l of single parameters.
        which: the place of a parameter's c in ``corrections``, by name; the last where it is not named.

    [0] Kingma and Ba, *Adam*, ICLR 2015.

    Example:
        >>> state, beta2 = optimizer.state[weight], 0.999
        >>> c = (1 - beta2 ** (float(state["step"]) + 1)) ** 0.5
        >>> step = AdamStep(1e-3, {"weight": state["exp_avg_sq"]}, (c,), beta2)
        >>> trial = Trial(step, PlainStep(0.1))
    """

    def __init__(
        self,
        lr: Number,
        second_moments: Params,
        corrections: tuple[Number, ...],
        beta2: float = 0.999,
        eps: float = 1e-8,
        scale: Mapping[str, Number] = MappingProxyType({}),
        which: Mapping[str, int] = MappingProxyType({}),
    ):
        super().__init__(lr, scale)
        self.second_moments, self.corrections, self.which = second_moments, corrections, which
        self.beta2, self.eps = beta2, eps

    @property
    def numbers(self) -> tuple[Number, ...]:
        return (self.lr, *self.corrections)

    def with_numbers(self, lr: Number, *corrections: Number) -> "AdamStep":
        step = copy.copy(self)
        step.lr, step.corrections = lr, corrections
        return step

    def at(self, params: Params, grads: Params) -> PlainStep:
        return PlainStep(self.lr, {name: self._factor(name, grads[name]) for name in params})

    def _factor(self, name: str, grad: torch.Tensor) -> torch.Tensor:
        moment = (1 - self.beta2) * grad.pow(2)
        if name in self.second_moments:
            moment = self.beta2 * self.second_moments[name] + moment
        root = moment.sqrt() / self.corrections[self.which.get(name, -1)] + self.eps
        return self.scale.get(name, 1.0) / root


class TrustRatioStep(PlainStep):
    """The step that LARS would make, momentum and weight decay aside.

        theta' = theta - l * q * g,       q = eta * |theta| / (|g| + weight_decay * |theta| + eps)

    q, one number a parameter, is that of the inner gradient, and is held fixed: Eq. (6) of [0].

    Args:
        lr: l >= 0.
        eta: trust coefficient, by parameter; one that is not named is not adapted (q = 1).
        weight_decay: by parameter.
        eps: the optimiser's.
        clip: whether l * q is at most l (LARC).
        scale: factors on l of single parameters.

    [0] You, Gitman and Ginsburg, *Large Batch Training of Convolutional Networks*, arXiv 1708.03888.
    """

    def __init__(
        self,
        lr: Number,
        eta: Mapping[str, float],
        weight_decay: Mapping[str, float],
        eps: float = 1e-8,
        clip: bool = False,
        scale: Mapping[str, Number] = MappingProxyType({}),
    ):
        super().__init__(lr, scale)
        self.eta, self.weight_decay, self.eps, self.clip = eta, weight_decay, eps, clip

    def at(self, params: Params, grads: Params) -> PlainStep:
        return PlainStep(self.lr, {name: self._factor(name, params[name], grads[name]) for name in params})

    def _factor(self, name: str, param: torch.Tensor, grad: torch.Tensor) -> Number:
        scale = self.scale.get(name, 1.0)
        if name not in self.eta:
            return scale
        size, slope = param.norm(), grad.norm()
        q = self.eta[name] * size / (slope + self.weight_decay[name] * size + self.eps)
        if self.clip:
            q = (q / (self.lr * scale)).clamp(max=1.0)
        return scale * torch.where((size > 0) & (slope > 0), q, 1.0)


class MatchedStep:
    """A plain step whose length is a share of another step's, so that it need not be guessed.

        theta' = theta - l * g,       l = share * |other step| / |g|

    l is held fixed where the step is differentiated.

    Args:
        other: the step whose length it has, such as the main optimiser's own.
        share: of that length, >= 0.
        scale: factors on l of single parameters.
    """

    def __init__(
        self, other: TrialStep, share: float = 1.0, scale: Mapping[str, Number] = MappingProxyType({})
    ):
        if share < 0:
            raise ValueError(f"MatchedStep: share must be >= 0, got {share}")
        self.other, self.share, self.scale = other, share, scale

    @property
    def numbers(self) -> tuple[Number, ...]:
        return self.other.numbers

    def with_numbers(self, *numbers: Number) -> "MatchedStep":
        return MatchedStep(self.other.with_numbers(*numbers), self.share, self.scale)

    def at(self, params: Params, grads: Params) -> PlainStep:
        # from the origin: from the weights a short step is lost in their digits
        origin = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        linear = self.other.at(params, grads), PlainStep(1.0, self.scale)
        wanted, unit = (get_total_norm(list(step.step(origin, grads).values())) for step in linear)
        return PlainStep(torch.where(unit > 0, self.share * wanted / unit, 0.0), self.scale)


class LinearTrial(NamedTuple):
    """The trial steps of both groups at one point: linear in the gradient."""

    encoder: PlainStep
    head: PlainStep


class Trial(NamedTuple):
    """The trial steps of both groups; the papers let their learning rates differ.

    Attributes:
        encoder: theta's.
        head: phi's.
        weight: what the inner loss counts for in the loss that the steps are made for.
        clip: largest norm of the weighted gradient over both groups, to which it is shortened; None for none.
    """

    encoder: TrialStep
    head: TrialStep
    weight: float = 1.0
    clip: float | None = None

    @property
    def steps(self) -> tuple[TrialStep, TrialStep]:
        return self.encoder, self.head

    def at(self, params: tuple[Params, Params], grads: tuple[Params, Params]) -> "LinearTrial":
        """Both steps as linear ones at one point, see :meth:`TrialStep.at`.

        Args:
            params: theta and phi, in no graph.
            grads: the gradients of the unweighted inner loss, in no graph.
        """
        if self.weight == 1 and self.clip is None:
            return LinearTrial(*(step.at(p, g) for step, p, g in zip(self.steps, params, grads)))
        factor = self._factor(grads)
        scaled = [{name: factor * grad for name, grad in group.items()} for group in grads]
        linear = [step.at(p, g) for step, p, g in zip(self.steps, params, scaled)]
        return LinearTrial(*(step.times(factor, group) for step, group in zip(linear, params)))

    def _factor(self, grads: tuple[Params, Params]) -> Number:
        """Of the gradient: its weight, and what clipping leaves of it."""
        if self.clip is None:
            return self.weight
        norm = self.weight * get_total_norm([grad for group in grads for grad in group.values()])
        return self.weight * (self.clip / (norm + CLIP_EPS)).clamp(max=1.0)
