"""The meta step's state around the engine: when it is due, its trial step, its own optimiser."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.bilevel import (
    ESTIMATORS,
    BilevelProblem,
    Estimator,
    MetaGradient,
    MomentumStep,
    PlainStep,
    Trial,
    TrialStep,
)
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.host.optimizers import build_optimizer

TRIALS = ("plain", "momentum")
SCHEDULES = ("iteration", "shared", "epoch")
TRIAL_ON = ("all", "heads")
PRECISIONS = ("full", "bf16")

DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "estimator": "exact",
    "estimator_kwargs": {},
    "trial": "plain",
    "trial_on": "all",
    "inner_lr": None,
    "every_n_steps": 1,
    "schedule": "iteration",
    "batch_share": 1.0,
    "precision": "full",
    "follow_schedule": False,
    "update_statistics": False,
}
"""Of ``method_kwargs.meta``; each method's preset adds its ``optimizer``, ICL-MSR's also its ``schedule``."""


def build_estimator(name: str, kwargs: dict[str, Any]) -> Estimator:
    """Builds an estimator by name (``method_kwargs.meta.estimator``) with its own settings."""
    estimator = ESTIMATORS[choose("method_kwargs.meta.estimator", name, ESTIMATORS)]
    try:
        return estimator(**kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"method_kwargs.meta.estimator_kwargs do not fit the estimator {name!r}: {error}"
        ) from error


class MetaUpdate:
    """Owns everything of the meta step that outlives one iteration.

    Not a module: its only tensors are optimiser state, saved through :meth:`state_dict`. The meta
    parameters themselves belong to the method.

    Args:
        cfg: ``method_kwargs.meta``: ``estimator``, ``estimator_kwargs``; ``trial`` (``plain``, or
            ``momentum`` as the official release); ``inner_lr``, the trial step's length, ``null`` for
            the main optimiser's current learning rate; ``trial_on``: ``all``, or ``heads``, the encoder then
            takes no trial step; ``schedule``: ``iteration``, a meta step after a regular step,
            ``shared``, before it and with its forward pass through the encoder, or ``epoch``, all meta steps
            after the epoch's last regular step; ``every_n_steps``: of these only every n-th;
            ``batch_share``, of each batch, in (0, 1]; ``precision``, of the encoder's arithmetic: ``full``,
            the parameters' own, or ``bf16`` (heads and losses always have the parameters' own);
            ``optimizer`` (name, lr, weight_decay, kwargs); ``follow_schedule``, whether the meta learning
            rate decays with the main one; ``update_statistics``, whether the meta step moves BatchNorm's
            running statistics, too, as in MetaMask's release: by a forward pass at the new weights.

    Attributes:
        per_iteration: whether a meta step follows a regular step.
        shared: whether it precedes one and shares its forward pass.
        per_epoch: whether the meta steps wait for the epoch's end.
    """

    def __init__(self, cfg: DictConfig):
        choose("method_kwargs.meta.trial", cfg.trial, TRIALS)
        choose("method_kwargs.meta.schedule", cfg.schedule, SCHEDULES)
        choose("method_kwargs.meta.trial_on", cfg.trial_on, TRIAL_ON)
        choose("method_kwargs.meta.precision", cfg.precision, PRECISIONS)
        name = "method_kwargs.meta"
        check(0 < cfg.batch_share <= 1, f"{name}.batch_share", "in (0, 1]", cfg.batch_share)
        check(
            cfg.schedule != "shared" or cfg.batch_share == 1,
            f"{name}.batch_share",
            "1 with schedule=shared, whose forward pass is of the whole batch",
            cfg.batch_share,
        )
        check(
            cfg.schedule != "shared" or not cfg.update_statistics,
            f"{name}.update_statistics",
            "False with schedule=shared, whose forward pass is the regular step's",
            cfg.update_statistics,
        )
        check(
            cfg.schedule != "shared" or cfg.estimator != "unrolled",
            f"{name}.estimator",
            "another than unrolled with schedule=shared, whose forward pass is differentiated once",
            cfg.estimator,
            "exact is equal to it",
        )
        check(cfg.every_n_steps >= 1, f"{name}.every_n_steps", ">= 1", cfg.every_n_steps)
        check(cfg.optimizer.lr > 0, f"{name}.optimizer.lr", "> 0", cfg.optimizer.lr)
        check(cfg.inner_lr is None or cfg.inner_lr >= 0, f"{name}.inner_lr", ">= 0 or null", cfg.inner_lr)
        check(
            cfg.precision == "full" or cfg.estimator != "unrolled",
            f"{name}.precision",
            "full with estimator=unrolled, the oracle",
            cfg.precision,
        )
        self.cfg = cfg
        self.per_iteration: bool = cfg.schedule == "iteration"
        self.shared: bool = cfg.schedule == "shared"
        self.per_epoch: bool = cfg.schedule == "epoch"
        self.estimator = build_estimator(cfg.estimator, OmegaConf.to_container(cfg.estimator_kwargs))
        self.optimizer: torch.optim.Optimizer | None = None
        self._state: dict | None = None

    def check(self, precision: str) -> None:
        """What shows only once the trainer is there.

        Args:
            precision: of the trainer, as Lightning names it.

        Raises:
            UserError: for settings that cannot be.
        """
        check(
            not (self.shared and precision == "16-mixed"),
            "method_kwargs.meta.schedule",
            "iteration or epoch with precision=16-mixed, whose scaled gradients it would have to share",
            self.cfg.schedule,
            "take precision=bf16-mixed",
        )

    def autocast(self, device: str) -> AbstractContextManager:
        """The encoder's precision in the meta step."""
        if self.cfg.precision == "full":
            return nullcontext()
        # without its cache, which would hand a later pass the casts, and the graph, of an earlier one
        return torch.autocast(device, torch.bfloat16, cache_enabled=False)

    def start(self, parameters: Iterable[nn.Parameter], main: torch.optim.Optimizer) -> None:
        """Builds the meta optimiser, once the parameters are on their device; applies loaded state.

        Raises:
            UserError: if the trial step cannot be derived from the main optimiser.
        """
        cfg = self.cfg
        if cfg.inner_lr is None and not self._step_is_lr(main):
            raise UserError(
                f"method_kwargs.meta.inner_lr must be set when the main optimiser is {type(main).__name__}: "
                "its learning rate is not the length of a gradient step; try 0.1"
            )
        if cfg.trial == "momentum" and "momentum" not in main.param_groups[0]:
            raise UserError(
                "method_kwargs.meta.trial must be 'plain' when the main optimiser is "
                f"{type(main).__name__}, got 'momentum'; only SGD and LARS keep a momentum buffer"
            )
        other = [key for key in ("nesterov", "dampening") if main.param_groups[0].get(key)]
        if cfg.trial == "momentum" and other:
            raise UserError(
                f"optimizer.kwargs.{other[0]} must be left out with method_kwargs.meta.trial='momentum', got "
                f"{main.param_groups[0][other[0]]}; or set method_kwargs.meta.trial=plain"
            )
        self.optimizer = build_optimizer(
            cfg.optimizer.name,
            [{"params": list(parameters)}],
            cfg.optimizer.lr,
            cfg.optimizer.weight_decay,
            OmegaConf.to_container(cfg.optimizer.kwargs),
        )
        if self._state is not None:
            (group,) = self.optimizer.param_groups
            wanted = {key: value for key, value in group.items() if key != "params"}
            self.optimizer.load_state_dict(self._state)
            if not cfg.follow_schedule:  # the checkpoint has settings of its own; the config's apply
                self.optimizer.param_groups[0] |= wanted

    @staticmethod
    def _step_is_lr(main: torch.optim.Optimizer) -> bool:
        """Whether the learning rate is a step length: for SGD, and for any host's LARS."""
        return isinstance(main, torch.optim.SGD) or type(main).__name__.lower() == "lars"

    def due(self, step: int) -> bool:
        """Whether the ``step``-th meta step, counted from 1, is to be made."""
        return step % self.cfg.every_n_steps == 0

    def trial(self, main: torch.optim.Optimizer, encoder: nn.Module, head: nn.Module) -> Trial:
        """The trial steps of this iteration, from the main optimiser's current state."""
        return Trial(self._trial_step(main, encoder), self._trial_step(main, head))

    def _trial_step(self, main: torch.optim.Optimizer, module: nn.Module) -> TrialStep:
        names = {param: name for name, param in module.named_parameters() if param.requires_grad}
        # of each parameter: biases and norms may have no decay, a predictor a rate of its own
        groups = {names[p]: group for group in main.param_groups for p in group["params"] if p in names}
        if not groups:  # no parameter of this module trains: a step of any length does nothing
            return PlainStep(0.0)
        first = next(iter(groups.values()))
        lr, scale = self.cfg.inner_lr, {}
        if lr is None:
            lr = max(group["lr"] for group in groups.values())
            scale = {name: group["lr"] / lr for name, group in groups.items() if group["lr"] != lr}
        if self.cfg.trial == "plain":
            return PlainStep(lr, scale)
        buffers = {name: main.state[param].get("momentum_buffer") for param, name in names.items()}
        return MomentumStep(
            lr,
            first["momentum"],
            {name: group["weight_decay"] for name, group in groups.items()},
            {name: buffer for name, buffer in buffers.items() if buffer is not None},
            scale,
        )

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        """The estimator's meta-gradient."""
        with torch.autocast(problem.weights[0].device.type, enabled=False):
            if self.cfg.trial_on == "heads":
                problem = problem.frozen_encoder()
            return self.estimator.gradient(problem, trial)

    def step(self, main: torch.optim.Optimizer) -> None:
        """Steps the meta optimiser on the ``.grad`` of its parameters, then clears it."""
        if self.cfg.follow_schedule:
            group = main.param_groups[0]
            decay = group["lr"] / group.get("initial_lr", group["lr"])
            for meta_group in self.optimizer.param_groups:
                meta_group["lr"] = self.cfg.optimizer.lr * decay
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict | None:
        return self._state if self.optimizer is None else self.optimizer.state_dict()

    def load_state_dict(self, state: dict | None) -> None:
        self._state = state
