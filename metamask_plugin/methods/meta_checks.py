"""Settings of the meta step: their defaults, what cannot be together, and what is warned of."""

import math
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.bilevel.inner_step import AUTO, RULES, is_adam, is_lars, is_sgd, resolved
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.modules.feature_queue import FeatureQueue

KEY = "method_kwargs.meta"
OVERSHOOT = 0.05
"""Share of the inner loss by which a trial step may raise the outer one, for an epoch, without a warning."""
STAYS = "what is meta-learned stays as it is at the start"

CHOICES = {
    "trial": RULES,
    "when": ("after_step", "before_step", "epoch_end"),
    "trial_on": ("all", "heads"),
    "precision": ("full", "bf16"),
    "outer_batch": ("same", "next"),
}

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


def check_settings(cfg: DictConfig) -> None:
    """Raises a UserError for settings that cannot be, or cannot be together.

    Args:
        cfg: ``method_kwargs.meta``.
    """
    for key, choices in CHOICES.items():
        choose(f"{KEY}.{key}", cfg[key], choices)
    shared, unrolled, length = cfg.when == "before_step", cfg.estimator == "unrolled", cfg.inner_lr
    number_or_null = length in (None, AUTO) or not isinstance(length, str) and length >= 0
    for fits, key, expected in (
        (0 < cfg.batch_share <= 1, "batch_share", "in (0, 1]"),
        (
            not shared or cfg.batch_share == 1,
            "batch_share",
            "1 with when=before_step, whose forward pass is of the whole batch",
        ),
        (
            not (shared and cfg.update_statistics),
            "update_statistics",
            "False with when=before_step, whose forward pass is the regular step's",
        ),
        (
            not (shared and unrolled),
            "estimator",
            "another than unrolled with when=before_step, whose forward pass is differentiated once",
        ),
        (cfg.every_n_steps >= 1, "every_n_steps", ">= 1"),
        (cfg.optimizer.lr > 0, "optimizer.lr", "> 0"),
        (cfg.accumulate >= 1, "accumulate", ">= 1"),
        (number_or_null, "inner_lr", ">= 0, auto or null"),
        (
            length != AUTO or cfg.trial in ("auto", "plain"),
            "inner_lr",
            "a number or null with another trial step than plain, whose length it matches",
        ),
        (
            not shared or cfg.outer_batch == "same",
            "outer_batch",
            "same with when=before_step, whose forward pass is of one batch",
        ),
        (
            not unrolled or cfg.precision == "full",
            "precision",
            "full with estimator=unrolled, the oracle",
        ),
    ):
        remedy = "exact is equal to it" if key == "estimator" else None
        check(fits, f"{KEY}.{key}", expected, OmegaConf.select(cfg, key), *([remedy] if remedy else []))


def check_run(cfg: DictConfig, method: Any, precision: str, ranks: int) -> None:
    """Raises a UserError for what cannot be together: the meta step, the task, the trainer's settings.

    Args:
        cfg: ``method_kwargs.meta``.
        method: a :class:`~metamask_plugin.methods.base.TaskMethod`.
        precision: of the trainer, as Lightning names it.
        ranks: how many train together.
    """
    check(
        not (cfg.when == "before_step" and precision == "16-mixed"),
        f"{KEY}.when",
        "after_step or epoch_end with precision=16-mixed, whose scaled gradients it would have to share",
        cfg.when,
        "take precision=bf16-mixed",
    )
    if method.hooks is not None:
        method.hooks.check_meta_step(ranks)
    remembers = any(isinstance(part, FeatureQueue) and len(part) > 0 for part in method.task.modules())
    for fits, expected in (
        (
            method.hooks is None,
            f"same with the task {method.cfg.method_kwargs.task}, which is told of one batch at a time",
        ),
        (
            not remembers,
            "same with a task that has a queue or bank: the batch of the trial step is in it by then",
        ),
    ):
        check(cfg.outer_batch == "same" or fits, f"{KEY}.outer_batch", expected, cfg.outer_batch)
    check(
        ranks == 1 or cfg.estimator != "unrolled",
        f"{KEY}.estimator",
        "another than unrolled where several processes train",
        "unrolled",
        "exact is equal to it",
    )
    check(
        ranks == 1 or not any(isinstance(module, nn.SyncBatchNorm) for module in method.modules()),
        "sync_batchnorm",
        "False with a meta step",
        True,
        "SyncBatchNorm has no second derivative; the heads see the global batch without it",
    )


def check_inner_step(cfg: DictConfig, main: torch.optim.Optimizer) -> None:
    """Raises a UserError where the inner step cannot be derived from the main optimiser.

    Args:
        cfg: ``method_kwargs.meta``.
        main: the main optimiser.
    """
    inner_lr = cfg.inner_lr
    trial = resolved(cfg.trial, inner_lr, main)
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


def missing_meta_steps(cfg: DictConfig, trainer: pl.Trainer) -> str | None:
    """A warning where a run, or its last epoch, will have no meta step; None where all is well.

    Args:
        cfg: ``method_kwargs.meta``.
        trainer: about to train.
    """
    every, per_epoch = cfg.every_n_steps, cfg.when == "epoch_end"
    batches, steps = trainer.num_training_batches, trainer.estimated_stepping_batches
    of_an_epoch = math.ceil(batches / trainer.accumulate_grad_batches)
    cut = per_epoch and steps % of_an_epoch != 0
    gradients = steps // of_an_epoch * (batches // every) if per_epoch else steps // every
    if cfg.outer_batch == "next" and (batches if per_epoch else of_an_epoch) < 2:
        return (
            f"warning: {KEY}.outer_batch=next makes no meta step in epochs of one batch: {STAYS}; "
            f"set {KEY}.outer_batch=same"
        )
    if every > (batches if per_epoch else steps) or (cut and steps < of_an_epoch):
        where = f"an epoch's {batches} batches" if per_epoch else f"the run's {steps} steps"
        return (
            f"warning: {KEY}.every_n_steps={every} makes no meta step in {where}: {STAYS}; lower it, "
            "or train longer"
        )
    if gradients < cfg.accumulate:
        return (
            f"warning: {KEY}.accumulate={cfg.accumulate} makes no meta step in a run of {gradients} "
            f"meta-gradients: {STAYS}; lower it, or train longer"
        )
    if cut:
        return (
            f"warning: max_steps={trainer.max_steps} ends within an epoch of {of_an_epoch} steps, whose meta "
            f"steps ({KEY}.when=epoch_end) are not made; take a multiple"
        )
    return None


def overshoot(cfg: DictConfig, gain: float, epoch: int) -> str:
    """The warning of an epoch whose trial steps raised the loss.

    Args:
        cfg: ``method_kwargs.meta``.
        gain: mean over the epoch's meta steps, < 0.
        epoch: from 0.
    """
    if cfg.inner_lr is None:  # as long as the main optimiser's own
        remedy = f"lower optimizer.lr, or give it a length of its own: {KEY}.inner_lr=1e-3"
    elif cfg.inner_lr == AUTO:
        remedy = f"set {KEY}.inner_lr=1e-3"
    elif cfg.trial in ("auto", "plain"):
        remedy = f"set {KEY}.inner_lr=auto, or {KEY}.inner_lr=null {KEY}.trial=adaptive"
    else:
        remedy = f"lower {KEY}.inner_lr, or set {KEY}.inner_lr=auto {KEY}.trial=plain"
    return (
        f"warning: in epoch {epoch + 1} the trial step raised the loss that it is to lower, by {-gain:.2g} "
        f"on average (train_trial_gain): what is meta-learned follows a step that overshoots; {remedy}"
    )
