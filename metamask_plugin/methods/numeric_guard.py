"""Numbers that are none: where they are noticed, and what is done about them."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from metamask_plugin.errors import NonFiniteError, choose

POLICIES = ("stop", "skip")
NAMED = 5
"""Tensors that a message names."""

DEFAULTS = {"nonfinite": "stop", "max_skipped": 10, "collapse_below": 0.01}
"""The config's block ``numbers``."""


class NumericGuard:
    """Looks at losses, gradients and meta parameters before anything is changed by them.

    One look a step, before the optimiser's, and one a meta step: on a GPU each is one wait for the device.
    What is found ends the run at that step, or leaves the step out:

    - ``numbers.nonfinite: stop``: a :class:`~metamask_plugin.errors.NonFiniteError` with what was seen. By
      then nothing has been changed but the running statistics of BatchNorm.
    - ``skip``: no parameter moves, BatchNorm's statistics go back to what they were, and there is no meta
      step and no update of queues and target networks. After more than ``numbers.max_skipped`` of them in a
      run it stops.

    Gradients that overflow in float16 are no error: the gradient scaler skips that step and scales less. The
    meta step and what follows an optimiser's step are left out then, too.

    Args:
        cfg: the host's configuration; of it the block ``numbers``.

    Attributes:
        passed_over: whether the optimiser's latest step changed nothing.
        skipped: steps left out so far.
    """

    def __init__(self, cfg: DictConfig):
        settings = {**DEFAULTS, **(OmegaConf.select(cfg, "numbers") or {})}
        self.skips = choose("numbers.nonfinite", settings["nonfinite"], POLICIES) == "skip"
        self.max_skipped: int = settings["max_skipped"]
        self.skipped = 0
        self.passed_over = False
        self._losses: list[tuple[str, torch.Tensor]] = []
        self._batches: list[torch.Tensor] = []
        self._views: list[torch.Tensor] = []
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []

    def start_batch(self, method: nn.Module, indexes: torch.Tensor, views: list[torch.Tensor]) -> None:
        """Before a batch's forward passes.

        Args:
            method: what is trained.
            indexes: of the images in the data set, (N,).
            views: images of each view, (N, 3, H, W) each.
        """
        if self.skips and not self._batches:  # accumulated batches are left out together
            self._statistics = [
                (buffer, buffer.clone())
                for module in method.modules()
                if isinstance(module, _NormBase)
                for buffer in module.buffers(recurse=False)
            ]
        self._batches.append(indexes)
        self._views = views

    def observe(self, losses: Mapping[str, torch.Tensor]) -> None:
        """The batch's losses, each a scalar by its name."""
        self._losses += [(name, loss.detach()) for name, loss in losses.items()]

    def before_step(self, method: pl.LightningModule, optimizer: torch.optim.Optimizer) -> None:
        """Between the backward pass and the optimiser's step.

        Raises:
            NonFiniteError: as the class says.
        """
        gradients = [
            (name, torch.linalg.vector_norm(parameter.grad))
            for name, parameter in method.named_parameters()
            if parameter.grad is not None and parameter.requires_grad
        ]
        bad_losses, bad_gradients = _nonfinite(self._losses if method.task.defined else [], gradients)
        scaler = getattr(method.trainer.precision_plugin, "scaler", None)
        overflow = scaler is not None and bool(bad_gradients) and not bad_losses
        failed = bool(bad_losses) or (bool(bad_gradients) and not overflow)
        if method.trainer.world_size > 1:  # all stop, or leave out, together
            failed = method.trainer.strategy.reduce_boolean_decision(failed, all=False)
        self.passed_over = overflow or failed
        if failed:
            seen = self._seen(method, optimizer, bad_losses, bad_gradients)
            self._refuse(seen)
            optimizer.zero_grad(set_to_none=True)  # to every optimiser a parameter without gradient is none
            for buffer, before in self._statistics:
                buffer.copy_(before)
        self._losses, self._batches, self._views, self._statistics = [], [], [], []

    def before_meta_step(
        self, method: pl.LightningModule, outer_loss: torch.Tensor, parameters: Iterable[nn.Parameter]
    ) -> bool:
        """Between the meta-gradient and the meta optimiser's step.

        Args:
            method: what is trained.
            outer_loss: L_out, a scalar.
            parameters: the meta parameters, with their ``.grad``.

        Returns:
            Whether the step is to be made.

        Raises:
            NonFiniteError: as the class says.
        """
        parameters = list(parameters)
        values = [(f"meta parameter {i}", torch.linalg.vector_norm(p)) for i, p in enumerate(parameters)]
        gradients = [
            (f"meta parameter {i}", torch.linalg.vector_norm(p.grad)) for i, p in enumerate(parameters)
        ]
        bad_values, bad_gradients = _nonfinite(
            [("train_outer_loss", outer_loss.detach()), *values], gradients
        )
        failed = bool(bad_values or bad_gradients)
        if method.trainer.world_size > 1:
            failed = method.trainer.strategy.reduce_boolean_decision(failed, all=False)
        if failed:
            self._refuse(self._seen(method, None, bad_values, bad_gradients))
            for parameter in parameters:
                parameter.grad = None
        return not failed

    def _refuse(self, seen: dict[str, Any]) -> None:
        """Counts a failure; raises where it is one too many."""
        if self.skips and self.skipped < self.max_skipped:
            self.skipped += 1
            print(
                f"warning: step left out ({self.skipped} of at most {self.max_skipped}): {_told(seen)}",
                flush=True,
            )
            return
        remedy = "lower optimizer.lr or method_kwargs.alpha, clip gradients (gradient_clip_val)"
        if seen["nonfinite_views"]:
            remedy = "look at the images of these indexes"
        limit = f"; {self.skipped} steps were left out before" if self.skipped else ""
        raise NonFiniteError(f"numbers must be finite, got {_told(seen)}{limit}; {remedy}", seen)

    def _seen(
        self,
        method: pl.LightningModule,
        optimizer: torch.optim.Optimizer | None,
        values: dict[str, float],
        gradients: dict[str, float],
    ) -> dict[str, Any]:
        trainer = method.trainer
        return {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "nonfinite": values,
            "nonfinite_gradients": gradients,
            "losses": {name: float(loss) for name, loss in self._losses},
            "nonfinite_views": [i for i, x in enumerate(self._views) if not bool(x.isfinite().all())],
            "learning_rates": [] if optimizer is None else [group["lr"] for group in optimizer.param_groups],
            "indexes": [index for batch in self._batches for index in batch.tolist()],
        }

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]


def _nonfinite(*groups: list[tuple[str, torch.Tensor]]) -> list[dict[str, float]]:
    """Of each group of named scalars those that are not finite; with one wait for the device if all are."""
    scalars = [value.float() for group in groups for _, value in group]
    if not scalars or bool(torch.stack(scalars).isfinite().all()):
        return [{} for _ in groups]
    return [{name: float(x) for name, x in group if not bool(x.isfinite())} for group in groups]


def _told(seen: dict[str, Any]) -> str:
    bad = [f"{name} = {value}" for name, value in seen["nonfinite"].items()]
    bad += [f"the gradient of {name}" for name in seen["nonfinite_gradients"]]
    what = ", ".join(bad[:NAMED]) or "a number of another process that is not"
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    views = (
        f", with pixels that are not in view {seen['nonfinite_views'][0]}" if seen["nonfinite_views"] else ""
    )
    return f"{what}{more} in epoch {seen['epoch'] + 1}, step {seen['step']}{views}"
