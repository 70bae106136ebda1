"""The inner step: from parameters and the inner gradient to adapted parameters."""

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.utils import get_total_norm

from metamask_plugin.bilevel.problem import Params

Number = float | torch.Tensor

CLIP_EPS = 1e-6
"""That of ``torch.nn.utils.clip_grad_norm_``."""


class StepRule(Protocol):
    """A gradient step on one group of parameters.

    Attributes:
        numbers: what changes from one iteration to the next and is no tensor that is read in place, the
            learning rate first.
        scale: factors on the learning rate, by parameter.
    """

    scale: Mapping[str, Number]

    @property
    def numbers(self) -> tuple[Number, ...]: ...

    def at(self, params: Params, grads: Params) -> "PlainStep":
        """Returns the step as one that is linear in the gradient, all else held fixed.

        Args:
            params: theta or phi, in no graph.
            grads: the inner gradient, in no graph.
        """

    def with_numbers(self, *numbers: Number) -> "StepRule":
        """Returns the same step with other :attr:`numbers`."""


class PlainStep:
    """A plain gradient step, theta' = theta - l * g. MetaMask Eq. (7) [0].

    Args:
        lr: l >= 0; a scalar tensor may change between two replays of a :class:`CudaGraph`.
        scale: factors on l of single parameters, by name: of a parameter, or of each of its entries.

    [0] Li et al., *MetaMask*, NeurIPS 2022.

    Example:
        >>> params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([2.0, -3.0])}
        >>> PlainStep(0.1).step(params, grads)["w"]
        tensor([0.8000, 1.3000])
    """

    def __init__(self, lr: Number, scale: Mapping[str, Number] = MappingProxyType({})):
        if not isinstance(lr, torch.Tensor) and lr < 0:
            raise ValueError(f"{type(self).__name__}: lr must be >= 0, got {lr}")
        self.lr, self.scale = lr, scale

    @property
    def numbers(self) -> tuple[Number, ...]:
        return (self.lr,)

    def with_numbers(self, *numbers: Number) -> "PlainStep":
        step = copy.copy(self)
        (step.lr,) = numbers
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
        """Returns the adapted parameters; differentiable in ``grads``, changes nothing in place."""
        return {name: param - self.length(name) * grads[name] for name, param in params.items()}

    def vjp(self, cotangent: Params) -> Params:
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

    Example:
        >>> params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([2.0, -3.0])}
        >>> rule = MomentumStep(0.1, momentum=0.9, weight_decay=0.0, buffers={"w": torch.ones(2)})
        >>> rule.step(params, grads)["w"]
        tensor([0.7100, 1.2100])
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
        >>> rule = AdamStep(0.1, {}, (0.001 ** 0.5,))
        >>> params, grads = {"w": torch.ones(2)}, {"w": torch.tensor([2.0, -3.0])}
        >>> rule.at(params, grads).step(params, grads)["w"]
        tensor([0.9000, 1.1000])
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

    def with_numbers(self, *numbers: Number) -> "AdamStep":
        step = copy.copy(self)
        step.lr, *corrections = numbers
        step.corrections = tuple(corrections)
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

    Example:
        >>> params, grads = {"w": torch.ones(4)}, {"w": torch.full((4,), 2.0)}
        >>> rule = TrustRatioStep(1.0, eta={"w": 0.1}, weight_decay={"w": 0.0})
        >>> rule.at(params, grads).step(params, grads)["w"]  # q = 0.1 * 2 / 4
        tensor([0.9000, 0.9000, 0.9000, 0.9000])
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

    Example:
        >>> params, grads = {"w": torch.zeros(4)}, {"w": torch.arange(1.0, 5.0)}
        >>> rule = MatchedStep(AdamStep(0.1, {}, (0.001 ** 0.5,)))  # Adam's first: 0.1 in each entry
        >>> round(rule.at(params, grads).step(params, grads)["w"].norm().item(), 3)
        0.2
    """

    def __init__(
        self, other: StepRule, share: float = 1.0, scale: Mapping[str, Number] = MappingProxyType({})
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
        # from the origin: from the parameters a short step is lost in their digits
        origin = {name: torch.zeros_like(grad) for name, grad in grads.items()}
        linear = self.other.at(params, grads), PlainStep(1.0, self.scale)
        wanted, unit = (get_total_norm(list(step.step(origin, grads).values())) for step in linear)
        return PlainStep(torch.where(unit > 0, self.share * wanted / unit, 0.0), self.scale)


class LinearStep(NamedTuple):
    """The rules of both groups at one point: linear in the gradient."""

    encoder: PlainStep
    head: PlainStep


class InnerStep(NamedTuple):
    """One gradient step on both groups, theta and phi: MetaMask's and ICL-MSR's trial step.

    The papers let the learning rates of the two groups differ.

    Attributes:
        encoder: theta's rule.
        head: phi's.
        weight: factor of the inner loss in the loss that the step is made for.
        clip: largest norm of the weighted gradient over both groups, to which it is shortened; None for none.

    Example:
        >>> step = InnerStep(encoder=PlainStep(0.1), head=PlainStep(0.2), clip=1.0)
        >>> params = {"w": torch.ones(1)}, {"v": torch.ones(1)}
        >>> grads = {"w": torch.tensor([3.0])}, {"v": torch.tensor([4.0])}  # norm 5, clipped to 1
        >>> step.at(params, grads).head.step(params[1], grads[1])["v"]
        tensor([0.8400])
    """

    encoder: StepRule
    head: StepRule
    weight: float = 1.0
    clip: float | None = None

    @classmethod
    def following(
        cls,
        main: torch.optim.Optimizer,
        encoder: nn.Module,
        head: nn.Module,
        rule: str = "auto",
        lr: float | str | None = None,
        weight: float = 1.0,
        clip: float | None = None,
    ) -> "InnerStep":
        """The inner step that follows an optimiser, from its current state.

        Args:
            main: the optimiser.
            encoder: theta's module.
            head: phi's.
            rule: see :data:`RULES`.
            lr: see :func:`rule_following`.
            weight: factor of the inner loss in the loss that the optimiser descends.
            clip: norm to which gradients are clipped. Weight and clipping are the optimiser's business: a
                plain step of a given length is the papers', without them.

        Example:
            >>> encoder, head = nn.Linear(3, 2), nn.Linear(2, 1)
            >>> optimizer = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], lr=1e-3)
            >>> step = InnerStep.following(optimizer, encoder, head, weight=100.0)
            >>> type(step.encoder).__name__, step.weight
            ('AdamStep', 100.0)
        """
        rules = rule_following(main, encoder, rule, lr), rule_following(main, head, rule, lr)
        return cls(*rules, weight, clip) if follows(rule, lr, main) else cls(*rules)

    def at(self, params: tuple[Params, Params], grads: tuple[Params, Params]) -> LinearStep:
        """Both rules as linear ones at one point, see :meth:`StepRule.at`.

        Args:
            params: theta and phi, in no graph.
            grads: the gradients of the unweighted inner loss, in no graph.
        """
        if self.weight == 1 and self.clip is None:
            return LinearStep(self.encoder.at(params[0], grads[0]), self.head.at(params[1], grads[1]))
        factor: Number = self.weight
        if self.clip is not None:
            norm = self.weight * get_total_norm([grad for group in grads for grad in group.values()])
            factor = self.weight * (self.clip / (norm + CLIP_EPS)).clamp(max=1.0)
        scaled = [{name: factor * grad for name, grad in group.items()} for group in grads]
        linear = [rule.at(p, g) for rule, p, g in zip(self[:2], params, scaled)]
        return LinearStep(*(rule.times(factor, group) for rule, group in zip(linear, params)))


RULES = ("auto", "plain", "adaptive", "momentum")
"""How an inner step may follow an optimiser: ``plain``, a gradient step of its length; ``adaptive``, the step
that it would make next, without momentum and weight decay; ``momentum``, with both; see :func:`resolved`."""

AUTO = "auto"
"""Of ``lr``: a plain step whose length follows the optimiser's own."""

SHARE = 0.02
"""Of the length of an adaptive step that such a step has. The raw gradient is steep in few directions: at
full length it overshoots in them."""


def is_sgd(main: torch.optim.Optimizer) -> bool:
    return isinstance(main, torch.optim.SGD)


def is_lars(main: torch.optim.Optimizer) -> bool:
    """Also another package's."""
    return type(main).__name__.lower() == "lars"


def is_adam(main: torch.optim.Optimizer) -> bool:
    return isinstance(main, torch.optim.Adam)  # AdamW is one


def resolved(rule: str, lr: float | str | None, main: torch.optim.Optimizer) -> str:
    """What ``auto`` stands for: ``adaptive`` for Adam, AdamW and LARS, unless a length is given."""
    if rule != "auto":
        return rule
    return "plain" if lr is not None or is_sgd(main) else "adaptive"


def follows(rule: str, lr: float | str | None, main: torch.optim.Optimizer) -> bool:
    """Whether the inner step, or its length, is the optimiser's own."""
    return resolved(rule, lr, main) == "adaptive" or lr == AUTO


def rule_following(
    main: torch.optim.Optimizer, module: nn.Module, rule: str = "auto", lr: float | str | None = None
) -> StepRule:
    """The rule of one module's parameters that follows an optimiser, from its current state.

    Args:
        main: the optimiser: SGD, Adam, AdamW, or a LARS of timm or solo-learn.
        module: encoder or heads.
        rule: of :data:`RULES`.
        lr: its length; None: the optimiser's learning rates; :data:`AUTO`, for a plain step: :data:`SHARE` of
            the adaptive one's length.

    Example:
        >>> module = nn.Linear(2, 1)
        >>> rule_following(torch.optim.SGD(module.parameters(), lr=0.1), module).numbers
        (0.1,)
    """
    rule = resolved(rule, lr, main)
    names = {param: name for name, param in module.named_parameters() if param.requires_grad}
    settings = {names[p]: group for group in main.param_groups for p in group["params"] if p in names}
    if not settings:  # no parameter of this module trains: a step of any length does nothing
        return PlainStep(0.0)
    if lr is None or lr == AUTO:
        length = max(group["lr"] for group in settings.values())
        scale = {name: group["lr"] / length for name, group in settings.items() if group["lr"] != length}
    else:
        length, scale = lr, {}
    group = _Group(main, names, settings, length, scale)
    if rule == "plain" and lr == AUTO:
        return MatchedStep(_adaptive(group), SHARE, scale)
    return {"plain": _plain, "adaptive": _adaptive, "momentum": _momentum}[rule](group)


@dataclass(frozen=True)
class _Group:
    """An optimiser's view of one module.

    Attributes:
        main: the optimiser.
        names: the module's parameters that train, with their names.
        settings: each parameter's group in the optimiser: biases and norms may have no decay, a predictor a
            rate of its own.
        lr: the length of the step, or the largest learning rate.
        scale: factors on it, where parameters have other rates.
    """

    main: torch.optim.Optimizer
    names: dict[nn.Parameter, str]
    settings: dict[str, dict[str, Any]]
    lr: Any
    scale: dict[str, float]

    def state(self, key: str) -> dict[str, Any]:
        """An entry of the optimiser's state, of the parameters that have it."""
        states = {name: self.main.state.get(param, {}) for param, name in self.names.items()}
        return {name: state[key] for name, state in states.items() if state.get(key) is not None}


def _plain(group: _Group) -> StepRule:
    return PlainStep(group.lr, group.scale)


def _momentum(group: _Group) -> StepRule:
    decay = {name: settings["weight_decay"] for name, settings in group.settings.items()}
    momentum = next(iter(group.settings.values()))["momentum"]
    return MomentumStep(group.lr, momentum, decay, group.state("momentum_buffer"), group.scale)


def _adaptive(group: _Group) -> StepRule:
    if is_sgd(group.main):
        return _plain(group)
    return _trust_ratio(group) if is_lars(group.main) else _adam(group)


def _adam(group: _Group) -> StepRule:
    settings = next(iter(group.settings.values()))
    beta2 = settings["betas"][1]
    corrections, which = _corrections(group.state("step"), beta2)
    moments, eps = group.state("exp_avg_sq"), settings["eps"]
    return AdamStep(group.lr, moments, corrections, beta2, eps, group.scale, which)


def _corrections(steps: dict[str, Any], beta2: float) -> tuple[tuple[Number, ...], dict[str, int]]:
    """Of :class:`AdamStep`: ``corrections`` and ``which``, from the optimiser's counts of steps, by name."""
    if any(isinstance(step, torch.Tensor) and step.device.type != "cpu" for step in steps.values()):
        # a fused optimiser counts on its device, whose numbers no step waits for
        counted = 1 - beta2 ** (torch.stack(list(steps.values())) + 1)
        which = {name: place for place, name in enumerate(steps)}
        return (*counted.sqrt().unbind(), (1 - beta2) ** 0.5), which
    made = {name: float(step) for name, step in steps.items()}
    counts = [*sorted(set(made.values())), 0.0]
    corrections = tuple((1 - beta2 ** (count + 1)) ** 0.5 for count in counts)
    return corrections, {name: counts.index(step) for name, step in made.items()}


def _trust_ratio(group: _Group) -> StepRule:
    """Also of solo-learn's LARS, which names its settings otherwise."""
    settings = next(iter(group.settings.values()))
    params = {name: param for param, name in group.names.items()}
    return TrustRatioStep(
        group.lr,
        {
            name: own["trust_coeff"] if "trust_coeff" in own else own["eta"]
            for name, own in group.settings.items()
            if _is_adapted(own, params[name])
        },
        {name: own["weight_decay"] for name, own in group.settings.items()},
        settings.get("eps", 1e-8),
        bool(settings.get("trust_clip", settings.get("clip_lr", False))),
        group.scale,
    )


def _is_adapted(settings: dict[str, Any], param: nn.Parameter) -> bool:
    if "always_adapt" in settings:
        return settings["always_adapt"] or settings["weight_decay"] != 0
    return param.ndim != 1 or not settings["exclude_bias_n_norm"]
