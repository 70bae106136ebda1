"""Optimisers and learning-rate schedules of the embedded host, by solo-learn's names."""

import math
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, MultiStepLR

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.host.contract import OPTIMIZERS, SCHEDULERS

ParamGroups = list[dict[str, Any]]


def without_decay_on_vectors(groups: ParamGroups) -> ParamGroups:
    """Splits each group: biases and norms (one-dimensional parameters) get no weight decay."""
    return _split(groups, lambda param: param.dim() <= 1, weight_decay=0.0)


def _split(groups: ParamGroups, apart: Callable[[torch.Tensor], bool], **settings: Any) -> ParamGroups:
    """Puts the parameters that are ``apart`` into groups of their own, ``<name>_no_decay``."""
    split = []
    for group in groups:
        params = list(group["params"])
        rest, others = [p for p in params if not apart(p)], [p for p in params if apart(p)]
        named = {}
        if "name" in group:
            named["name"] = f"{group['name'].removesuffix('_no_decay')}_no_decay"
        split += [{**group, "params": rest}] if rest else []
        split += [{**group, **named, **settings, "params": others}] if others else []
    return split


def build_optimizer(
    name: str, groups: ParamGroups, lr: float, weight_decay: float, kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    """Builds an optimiser by solo-learn's name and with its keyword arguments.

    Args:
        name: one of :data:`~metamask_plugin.host.contract.OPTIMIZERS`.
        groups: parameter groups.
        lr: learning rate, already scaled by the batch size.
        weight_decay: for groups that do not set their own.
        kwargs: as in solo-learn's configs; for ``lars`` ``eta``, ``clip_lr``, ``exclude_bias_n_norm``.

    Raises:
        UserError: for an unknown name or keyword.
    """
    choose("optimizer.name", name, OPTIMIZERS)
    kwargs = dict(kwargs)
    if name == "lars":
        if kwargs.pop("exclude_bias_n_norm", False):
            groups = _split(groups, lambda param: param.dim() == 1, weight_decay=0.0, always_adapt=False)
        kwargs = {
            "trust_coeff": kwargs.pop("eta", 1e-3),
            "trust_clip": kwargs.pop("clip_lr", False),
            # by itself timm leaves groups without weight decay, as the classifier's, unadapted
            "always_adapt": True,
            **kwargs,
        }
    constructors = {
        "sgd": torch.optim.SGD,
        "lars": timm.optim.Lars,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    try:
        return constructors[name](groups, lr=lr, weight_decay=weight_decay, **kwargs)
    except TypeError as error:
        raise UserError(f"optimizer.kwargs do not fit optimizer.name={name!r}: {error}") from error


def _warmup_cosine(base_lr: float, warmup: float, total: float, start_lr: float, min_lr: float):
    """Factor on ``base_lr`` after t steps: linear from ``start_lr``, then cosine to ``min_lr``.

    As in solo-learn the last of ``warmup`` steps has the full rate already, and so has the one after it,
    the cosine's first.
    """

    def factor(t: int) -> float:
        if t < warmup:
            done = min(1.0, t / (warmup - 1)) if warmup > 1 else 0.0
            return (start_lr + (base_lr - start_lr) * done) / base_lr
        progress = min(1.0, (t - warmup) / max(1.0, total - warmup))
        return (min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2) / base_lr

    return factor


class _Schedule(LambdaLR):
    """A schedule that also goes on from the state of solo-learn's."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        known = {key: value for key, value in state_dict.items() if key in self.__dict__}
        super().load_state_dict({"lr_lambdas": [None] * len(self.lr_lambdas), **known})


def build_scheduler(
    name: str,
    optimizer: torch.optim.Optimizer,
    warmup: float,
    total: float,
    warmup_start_lr: float = 3e-5,
    min_lr: float = 0.0,
    lr_decay_steps: list[int] | None = None,
) -> LRScheduler | None:
    """Builds a schedule by solo-learn's name; ``None`` for ``none``.

    Args:
        name: one of :data:`~metamask_plugin.host.contract.SCHEDULERS`.
        optimizer: its groups may set ``static_lr: True`` to stay at their rate.
        warmup: length of the linear warm-up, in the unit in which the schedule is stepped.
        total: length of the whole schedule, same unit.
        warmup_start_lr: learning rate at step 0.
        min_lr: learning rate at the end of the cosine.
        lr_decay_steps: milestones of ``step``, in its unit; each divides the rate by ten.

    Raises:
        UserError: for an unknown name, or ``step`` without milestones.
    """
    choose("scheduler.name", name, SCHEDULERS)
    if name == "none":
        return None
    if name == "step":
        if not lr_decay_steps:
            raise UserError(
                "scheduler.lr_decay_steps must be a list of epochs for scheduler.name='step', got None"
            )
        return MultiStepLR(optimizer, list(lr_decay_steps))
    factors = [
        (lambda t: 1.0)
        if group.get("static_lr") or group["lr"] == 0
        else _warmup_cosine(
            group["lr"], warmup, total, warmup_start_lr if warmup > 0 else group["lr"], min_lr
        )
        for group in optimizer.param_groups
    ]
    return _Schedule(optimizer, factors)


def build_warmup_step(
    optimizer: torch.optim.Optimizer,
    warmup_steps: int,
    steps_per_epoch: float,
    max_epochs: int,
    lr_decay_steps: list[int] | None,
    decay_factor: float,
) -> LRScheduler:
    """Linear warm-up over optimiser steps, then drops at epochs: ``scheduler.name: warmup_step``.

    Neither host's own. ICL-MSR trains with 500 steps of warm-up and a factor of 0.2 at 50 and at 25
    epochs before the end (Section 6.2).

    Args:
        optimizer: its groups may set ``static_lr: True`` to stay at their rate.
        warmup_steps: ``scheduler.warmup_steps``, optimiser steps.
        steps_per_epoch: optimiser steps in an epoch.
        max_epochs: epochs in all.
        lr_decay_steps: epochs; negative ones count from the end, and are left out where the run is
            shorter than that.
        decay_factor: what each of them multiplies the learning rate by.

    Raises:
        UserError: for a value that cannot be.
    """
    check(warmup_steps >= 0, "scheduler.warmup_steps", "a number of optimiser steps >= 0", warmup_steps)
    check(0 < decay_factor <= 1, "scheduler.decay_factor", "in (0, 1]", decay_factor)
    epochs = [epoch if epoch >= 0 else max_epochs + epoch for epoch in lr_decay_steps or []]
    drops = [epoch * steps_per_epoch for epoch in epochs if epoch > 0]

    def factor(t: int) -> float:
        warmup = min(1.0, (t + 1) / warmup_steps) if warmup_steps else 1.0
        return warmup * decay_factor ** sum(t >= drop for drop in drops)

    factors = [(lambda t: 1.0) if group.get("static_lr") else factor for group in optimizer.param_groups]
    return LambdaLR(optimizer, factors)
