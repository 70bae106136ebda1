"""Checkpoints from which a run goes on as if it had never stopped."""

import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from metamask_plugin.data.batches import EpochPosition
from metamask_plugin.signals import Preempted
from metamask_plugin.training.preemption import Preemption
from metamask_plugin.training.ranks import of_all_ranks, of_this_rank
from metamask_plugin.training.run_folder import RunFolder


def rng_state() -> dict[str, Any]:
    """The state of every global random number generator, in types that ``weights_only`` accepts."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "python": [version, list(internal), gauss],
    }


def restore_rng_state(state: dict[str, Any]) -> None:
    """Restores what :func:`rng_state` returned; CUDA only on as many devices as it was taken from."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class Checkpointer(pl.Callback):
    """Saves ``last.ckpt`` every ``frequency`` epochs and after the last, and ``best/best.ckpt``.

    Also every ``every_n_steps`` steps and before a preemption ends the run: then in the middle of an epoch,
    between two batches, from where the epoch goes on with the batch that comes next. The one before the last
    stays as ``previous.ckpt``. A checkpoint says of which experiment it is. Must stand behind the callbacks
    whose state it is to save.

    Args:
        folder: the run's folder.
        frequency: epochs between checkpoints.
        monitor: the metric whose highest value makes the best checkpoint, e.g. ``knn20``.
        position: of the run's data module.
        preemption: what watches for signals; None for nothing.
        every_n_steps: optimiser steps between checkpoints within an epoch; None for none.
        identity: what the checkpoint is to say of the run it is of, in plain values.
    """

    def __init__(
        self,
        folder: RunFolder,
        frequency: int = 1,
        monitor: str | None = None,
        position: EpochPosition | None = None,
        preemption: Preemption | None = None,
        every_n_steps: int | None = None,
        identity: dict[str, Any] | None = None,
    ):
        self.folder, self.frequency, self.monitor = folder, frequency, monitor
        self.position, self.preemption, self.every_n_steps = position, preemption, every_n_steps
        self.identity = identity or {}
        self.best = float("-inf")
        self._rng: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._saved_at = trainer.global_step
        if self.position is not None:
            self.position.before_batch = lambda: self._between_batches(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.position is None or not self.position.done:
            self._restore_rng()  # resumed: from here on as if nothing had happened

    def _between_batches(self, trainer: pl.Trainer) -> None:
        """Goes on with the random numbers of a resumed epoch; saves, and stops, where that is due."""
        self._restore_rng()
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.ready != batches.completed:
            return  # not between two of the epoch's batches: the meta steps of meta.schedule=epoch draw these
        accumulating = batches.completed % trainer.accumulate_grad_batches != 0
        if accumulating:  # gradients are not saved
            return
        number = None if self.preemption is None else self.preemption.asked_to_stop(trainer)
        due = self.every_n_steps is not None and trainer.global_step - self._saved_at >= self.every_n_steps
        saved = self._saved_at == trainer.global_step
        within = 0 < batches.completed < trainer.num_training_batches
        if (due or number is not None) and within and trainer.lightning_module.resumes_within_epoch:
            self._save(trainer, self.folder.last_checkpoint)
        elif number is not None and not saved and trainer.lightning_module.resumes_within_epoch:
            return  # before an epoch's first batch: there will be something to save after it
        if number is not None:
            raise Preempted(number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        # every rank takes part in saving, so rank 0, which measured, decides for all
        improved = trainer.strategy.broadcast(value is not None and float(value) > self.best)
        if improved:
            self.best = trainer.strategy.broadcast(float(value) if value is not None else self.best)
        finished = trainer.current_epoch + 1
        last = finished == trainer.max_epochs or trainer.global_step >= trainer.max_steps > 0
        stopping = self.preemption is not None and self.preemption.asked_to_stop(trainer) is not None
        if finished % self.frequency == 0 or last or stopping:
            self._save(trainer, self.folder.last_checkpoint)
        if improved:
            self._save(trainer, self.folder.best_checkpoint)

    def _save(self, trainer: pl.Trainer, path: Path) -> None:
        trainer.save_checkpoint(path)
        self._saved_at = trainer.global_step

    def _restore_rng(self) -> None:
        if self._rng is not None:
            restore_rng_state(self._rng)
            self._rng = None

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = of_all_ranks(rng_state())  # each draws numbers of its own
        checkpoint["identity"] = self.identity
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        checkpoint["batches_done"] = batches.completed % trainer.num_training_batches

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._rng = of_this_rank(trainer, checkpoint.get("rng"))
        if self.position is not None:
            self.position.done = checkpoint.get("batches_done", 0)
