"""What is said of meta steps that will not be made, or that follow a trial step which overshoots."""

import math

import lightning.pytorch as pl
from omegaconf import DictConfig

from metamask_plugin.methods.trial_steps import AUTO

KEY = "method_kwargs.meta"
OVERSHOOT = 0.05
"""Share of the inner loss by which a trial step may raise the outer one, for an epoch, without a warning."""
STAYS = "what is meta-learned stays as it is at the start"


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
