"""The meta step's state around the engine: when it is due, its trial step, its own optimiser."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

from metamask_plugin.bilevel import ESTIMATORS, BilevelProblem, Estimator, MetaGradient, Trial
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.host.optimizers import build_optimizer
from metamask_plugin.methods.trial_steps import AUTO, TRIALS, check_trial, resolved, trial_step

WHEN = ("after_step", "before_step", "epoch_end")
TRIAL_ON = ("all", "heads")
PRECISIONS = ("full", "bf16")
OUTER_BATCHES = ("same", "next")

DEFAULTS: dict[str, Any] = {
    "enabled": True,
    "estimator": "exact",
    "estimator_kwargs": {},
    "trial": "auto",
    "trial_on": "all",
    "inner_lr": None,
    "every_n_steps": 1,
    "when": "after_step",
    "outer_batch": "same",
    "accumulate": 1,
    "batch_share": 1.0,
    "precision": "full",
    "decay_lr": False,
    "update_statistics": False,
}
"""Of ``method_kwargs.meta``; each method's preset adds its ``optimizer``, ICL-MSR's also ``when``."""


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
        cfg: ``method_kwargs.meta``: ``estimator``, ``estimator_kwargs``; ``trial``: ``plain``, a gradient
            step as in the papers; ``adaptive``, scaled as the main optimiser scales its own; ``momentum``, as
            in MetaMask's release; ``auto``: adaptive for Adam, AdamW and LARS, unless a length is given, and
            plain otherwise; ``inner_lr``, the trial step's length, ``null`` for the main optimiser's current
            learning rate, ``auto`` for a plain step whose length follows the adaptive one's;
            ``outer_batch``: ``same``, or ``next``, the outer loss is then of the batch after the one of the
            trial step; ``accumulate``: how many meta-gradients one meta step is the mean of; ``trial_on``:
            ``all``, or ``heads``, the encoder then takes no trial step; ``when``: ``after_step``, a meta
            step after a regular step, ``before_step``, before it and with its forward pass through the
            encoder, or ``epoch_end``, all meta steps after the epoch's last regular step; ``every_n_steps``:
            of these only every n-th; ``batch_share``, of each batch, in (0, 1]; ``precision``, of the
            encoder's arithmetic: ``full``, the parameters' own, or ``bf16`` (heads and losses always have the
            parameters' own); ``optimizer`` (name, lr, weight_decay, kwargs); ``decay_lr``, whether the meta
            learning rate decays with the main one; ``update_statistics``, whether the meta step moves
            BatchNorm's running statistics, too, as in MetaMask's release: by a forward pass at the new
            weights.

    Attributes:
        per_iteration: whether a meta step follows a regular step.
        shared: whether it precedes one and shares its forward pass.
        per_epoch: whether the meta steps wait for the epoch's end.
    """

    def __init__(self, cfg: DictConfig):
        choose("method_kwargs.meta.trial", cfg.trial, TRIALS)
        choose("method_kwargs.meta.when", cfg.when, WHEN)
        choose("method_kwargs.meta.trial_on", cfg.trial_on, TRIAL_ON)
        choose("method_kwargs.meta.precision", cfg.precision, PRECISIONS)
        choose("method_kwargs.meta.outer_batch", cfg.outer_batch, OUTER_BATCHES)
        name = "method_kwargs.meta"
        check(0 < cfg.batch_share <= 1, f"{name}.batch_share", "in (0, 1]", cfg.batch_share)
        check(
            cfg.when != "before_step" or cfg.batch_share == 1,
            f"{name}.batch_share",
            "1 with when=before_step, whose forward pass is of the whole batch",
            cfg.batch_share,
        )
        check(
            cfg.when != "before_step" or not cfg.update_statistics,
            f"{name}.update_statistics",
            "False with when=before_step, whose forward pass is the regular step's",
            cfg.update_statistics,
        )
        check(
            cfg.when != "before_step" or cfg.estimator != "unrolled",
            f"{name}.estimator",
            "another than unrolled with when=before_step, whose forward pass is differentiated once",
            cfg.estimator,
            "exact is equal to it",
        )
        check(cfg.every_n_steps >= 1, f"{name}.every_n_steps", ">= 1", cfg.every_n_steps)
        check(cfg.optimizer.lr > 0, f"{name}.optimizer.lr", "> 0", cfg.optimizer.lr)
        check(cfg.accumulate >= 1, f"{name}.accumulate", ">= 1", cfg.accumulate)
        length = cfg.inner_lr
        check(
            length in (None, AUTO) or not isinstance(length, str) and length >= 0,
            f"{name}.inner_lr",
            ">= 0, auto or null",
            length,
        )
        check(
            length != AUTO or cfg.trial in ("auto", "plain"),
            f"{name}.inner_lr",
            "a number or null with another trial step than plain, whose length it matches",
            length,
        )
        check(
            cfg.when != "before_step" or cfg.outer_batch == "same",
            f"{name}.outer_batch",
            "same with when=before_step, whose forward pass is of one batch",
            cfg.outer_batch,
        )
        check(
            cfg.precision == "full" or cfg.estimator != "unrolled",
            f"{name}.precision",
            "full with estimator=unrolled, the oracle",
            cfg.precision,
        )
        self.cfg = cfg
        self.per_iteration: bool = cfg.when == "after_step"
        self.shared: bool = cfg.when == "before_step"
        self.per_epoch: bool = cfg.when == "epoch_end"
        self.estimator = build_estimator(cfg.estimator, OmegaConf.to_container(cfg.estimator_kwargs))
        self.optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] | None = None
        self._previous: list[torch.Tensor] | None = None
        self._gathered: list[list[torch.Tensor]] = []

    def check(self, precision: str) -> None:
        """What shows only once the trainer is there.

        Args:
            precision: of the trainer, as Lightning names it.

        Raises:
            UserError: for settings that cannot be.
        """
        check(
            not (self.shared and precision == "16-mixed"),
            "method_kwargs.meta.when",
            "after_step or epoch_end with precision=16-mixed, whose scaled gradients it would have to share",
            self.cfg.when,
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
        check_trial(resolved(cfg.trial, cfg.inner_lr, main), cfg.inner_lr, main)
        self.optimizer = build_optimizer(
            cfg.optimizer.name,
            [{"params": list(parameters)}],
            cfg.optimizer.lr,
            cfg.optimizer.weight_decay,
            OmegaConf.to_container(cfg.optimizer.kwargs),
        )
        if self._state is None:
            return
        (group,) = self.optimizer.param_groups
        wanted = {key: value for key, value in group.items() if key != "params"}
        self.optimizer.load_state_dict(self._state["meta_optimizer"])
        if not cfg.decay_lr:  # the checkpoint has settings of its own; the config's apply
            self.optimizer.param_groups[0] |= wanted
        if "meta_gradients" in self._state:  # of this version on
            gradients = _moved(self._state["meta_gradients"], group["params"][0].device)
            self._previous, self._gathered = gradients["previous"], gradients["gathered"]

    def due(self, step: int) -> bool:
        """Whether the ``step``-th meta step, counted from 1, is to be made."""
        return step % self.cfg.every_n_steps == 0

    def trial(
        self,
        main: torch.optim.Optimizer,
        encoder: nn.Module,
        head: nn.Module,
        weight: float = 1.0,
        clip: float | None = None,
    ) -> Trial:
        """The trial steps of this iteration, from the main optimiser's current state.

        Args:
            main: the main optimiser.
            encoder: theta's module.
            head: phi's.
            weight: what the inner loss counts for in the regular loss.
            clip: to which norm the trainer clips gradients; None for none. Weight and clipping are the
                optimiser's business: a plain step of a given length is the papers', without them.
        """
        kind, length = resolved(self.cfg.trial, self.cfg.inner_lr, main), self.cfg.inner_lr
        steps = (trial_step(kind, length, main, module) for module in (encoder, head))
        return Trial(*steps, *((weight, clip) if self.follows(main) else ()))

    def follows(self, main: torch.optim.Optimizer) -> bool:
        """Whether the trial step, or its length, is the main optimiser's own."""
        kind = resolved(self.cfg.trial, self.cfg.inner_lr, main)
        return kind == "adaptive" or self.cfg.inner_lr == AUTO

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        """The estimator's meta-gradient."""
        with torch.autocast(problem.weights[0].device.type, enabled=False):
            if self.cfg.trial_on == "heads":
                problem = problem.frozen_encoder()
            return self.estimator.gradient(problem, trial)

    def statistics(self, parameters: Iterable[nn.Parameter]) -> dict[str, torch.Tensor]:
        """What one meta-gradient, the parameters' ``.grad``, looks like; scalars to log.

        ``meta_gradient_norm``, and from the second on ``meta_gradient_cosine`` with the one before: near 1
        where all batches ask for the same, near 0 where it is the batch that speaks.
        """
        gradients = [parameter.grad.detach() for parameter in parameters]
        norm = get_total_norm(gradients)
        found = {"meta_gradient_norm": norm}
        if self._previous is not None:
            product = sum((a * b).sum() for a, b in zip(gradients, self._previous))
            lengths = norm * get_total_norm(self._previous)
            found["meta_gradient_cosine"] = product / lengths.clamp(min=torch.finfo(norm.dtype).tiny)
        self._previous = [gradient.clone() for gradient in gradients]
        return found

    def step(self, main: torch.optim.Optimizer) -> None:
        """Steps the meta optimiser on the ``.grad`` of its parameters, then clears it.

        With ``accumulate: m`` on the mean of m of them, once they are there.
        """
        if self.cfg.decay_lr:
            group = main.param_groups[0]
            decay = group["lr"] / group.get("initial_lr", group["lr"])
            for meta_group in self.optimizer.param_groups:
                meta_group["lr"] = self.cfg.optimizer.lr * decay
        if self.cfg.accumulate == 1 or self._gather():
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _gather(self) -> bool:
        """Adds a gradient to those that wait; whether they are enough, and their mean is ``.grad`` now."""
        parameters = self.optimizer.param_groups[0]["params"]
        self._gathered.append([parameter.grad.detach().clone() for parameter in parameters])
        if len(self._gathered) < self.cfg.accumulate:
            return False
        for parameter, gradients in zip(parameters, zip(*self._gathered)):
            parameter.grad = torch.stack(gradients).mean(dim=0)
        self._gathered = []
        return True

    def state_dict(self) -> dict[str, Any]:
        """The meta optimiser's state and the meta-gradients still wanted, by their keys in a checkpoint."""
        if self.optimizer is None:
            return self._state or {}
        gradients = {"previous": self._previous, "gathered": self._gathered}
        return {"meta_optimizer": self.optimizer.state_dict(), "meta_gradients": gradients}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` has put into a checkpoint, once :meth:`start` is called."""
        if checkpoint.get("meta_optimizer") is not None:
            keys = ("meta_optimizer", "meta_gradients")
            self._state = {key: checkpoint[key] for key in keys if key in checkpoint}


def _moved(gradients: Any, device: torch.device) -> Any:
    return tree_map_only(torch.Tensor, lambda gradient: gradient.to(device), gradients)
