"""The trial step that follows the main optimiser: its learning rates, its state, its own scaling."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from metamask_plugin.bilevel import (
    AdamStep,
    MatchedStep,
    MomentumStep,
    PlainStep,
    TrialStep,
    TrustRatioStep,
)
from metamask_plugin.bilevel.trial import Number
from metamask_plugin.errors import UserError, check

TRIALS = ("auto", "plain", "adaptive", "momentum")
AUTO = "auto"
"""Of ``meta.inner_lr``: a plain step whose length follows the main optimiser's own."""
SHARE = 0.02
"""Of the length of an adaptive step that such a step has. The raw gradient is steep in few directions: at
full length it overshoots in them."""


def is_sgd(main: torch.optim.Optimizer) -> bool:
    return isinstance(main, torch.optim.SGD)


def is_lars(main: torch.optim.Optimizer) -> bool:
    """Of any host."""
    return type(main).__name__.lower() == "lars"


def is_adam(main: torch.optim.Optimizer) -> bool:
    return isinstance(main, torch.optim.Adam)  # AdamW is one


def resolved(trial: str, inner_lr: float | str | None, main: torch.optim.Optimizer) -> str:
    """What ``trial: auto`` stands for: ``adaptive`` for Adam, AdamW and LARS, unless a length is given."""
    if trial != "auto":
        return trial
    return "plain" if inner_lr is not None or is_sgd(main) else "adaptive"


def check_trial(trial: str, inner_lr: float | str | None, main: torch.optim.Optimizer) -> None:
    """Raises a UserError where the trial step cannot be derived from the main optimiser.

    Args:
        trial: ``method_kwargs.meta.trial``, resolved.
        inner_lr: ``method_kwargs.meta.inner_lr``.
        main: the main optimiser.
    """
    kind, group = type(main).__name__, main.param_groups[0]
    known = is_sgd(main) or is_lars(main) or is_adam(main)
    if trial == "plain" and inner_lr is None and not is_sgd(main):
        name = "method_kwargs.meta"
        remedy = f"set {name}.trial=auto, or {name}.inner_lr=auto" if known else "try 1e-3"
        raise UserError(
            f"method_kwargs.meta.inner_lr must be set for trial=plain when the main optimiser is {kind}: "
            f"its learning rate is not the length of a gradient step; {remedy}"
        )
    if trial == "adaptive" or inner_lr == AUTO:
        check(known, "optimizer.name", "sgd, lars, adam or adamw, whose scaling is known", kind)
        amsgrad = group.get("amsgrad", False)
        remedy = "set method_kwargs.meta.inner_lr=1e-3"
        check(not amsgrad, "optimizer.kwargs.amsgrad", "False with an adaptive trial step", amsgrad, remedy)
    if trial != "momentum":
        return
    if "momentum" not in group:
        raise UserError(
            f"method_kwargs.meta.trial must be plain when the main optimiser is {kind}, got 'momentum'; "
            "only SGD and LARS keep a momentum buffer"
        )
    other = [key for key in ("nesterov", "dampening") if group.get(key)]
    if other:
        raise UserError(
            f"optimizer.kwargs.{other[0]} must be left out with method_kwargs.meta.trial='momentum', got "
            f"{group[other[0]]}; or set method_kwargs.meta.trial=plain"
        )


@dataclass(frozen=True)
class Group:
    """The main optimiser's view of one module.

    Attributes:
        main: the main optimiser.
        names: the module's parameters that train, with their names.
        settings: each parameter's group in the optimiser: biases and norms may have no decay, a predictor a
            rate of its own.
        lr: the length of the step, or the largest learning rate.
        scale: factors on it, where parameters have other rates.
    """

    main: torch.optim.Optimizer
    names: dict[nn.Parameter, str]
    settings: dict[str, dict[str, Any]]
    lr: float
    scale: dict[str, float]

    def state(self, key: str) -> dict[str, Any]:
        """An entry of the optimiser's state, of the parameters that have it."""
        states = {name: self.main.state.get(param, {}) for param, name in self.names.items()}
        return {name: state[key] for name, state in states.items() if state.get(key) is not None}


def trial_step(
    trial: str, inner_lr: float | str | None, main: torch.optim.Optimizer, module: nn.Module
) -> TrialStep:
    """The trial step of one module, from the main optimiser's current state.

    Args:
        trial: ``plain``, ``adaptive`` or ``momentum``.
        inner_lr: its length; None: the main optimiser's learning rates; :data:`AUTO`, for a plain step:
            :data:`SHARE` of the adaptive one's length.
        main: the main optimiser.
        module: encoder or heads.
    """
    names = {param: name for name, param in module.named_parameters() if param.requires_grad}
    settings = {names[p]: group for group in main.param_groups for p in group["params"] if p in names}
    if not settings:  # no parameter of this module trains: a step of any length does nothing
        return PlainStep(0.0)
    lr, scale = inner_lr, {}
    if lr is None or lr == AUTO:
        lr = max(group["lr"] for group in settings.values())
        scale = {name: group["lr"] / lr for name, group in settings.items() if group["lr"] != lr}
    group = Group(main, names, settings, lr, scale)
    if trial == "plain" and inner_lr == AUTO:
        return MatchedStep(_adaptive(group), SHARE, scale)
    return STEPS[trial](group)


def _plain(group: Group) -> TrialStep:
    return PlainStep(group.lr, group.scale)


def _momentum(group: Group) -> TrialStep:
    decay = {name: settings["weight_decay"] for name, settings in group.settings.items()}
    momentum = next(iter(group.settings.values()))["momentum"]
    return MomentumStep(group.lr, momentum, decay, group.state("momentum_buffer"), group.scale)


def _adaptive(group: Group) -> TrialStep:
    if is_sgd(group.main):
        return _plain(group)
    return _trust_ratio(group) if is_lars(group.main) else _adam(group)


def _adam(group: Group) -> TrialStep:
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


def _trust_ratio(group: Group) -> TrialStep:
    """timm's LARS, and solo-learn's, which names its settings otherwise."""
    settings = next(iter(group.settings.values()))
    params = {name: param for param, name in group.names.items()}
    return TrustRatioStep(
        group.lr,
        {
            name: own.get("trust_coeff", own.get("eta"))
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


STEPS: dict[str, Callable[[Group], TrialStep]] = {
    "plain": _plain,
    "adaptive": _adaptive,
    "momentum": _momentum,
}
