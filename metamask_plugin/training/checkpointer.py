"""Checkpoints from which a run goes on as if it had never stopped."""

import os
import random
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

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

    Must stand behind the callbacks whose state it is to save. A file is written beside its place and
    moved there, so that an interrupted write costs nothing.

    Args:
        folder: the run's folder.
        frequency: epochs between checkpoints.
        monitor: the metric whose highest value makes the best checkpoint, e.g. ``knn20``.
    """

    def __init__(self, folder: RunFolder, frequency: int = 1, monitor: str | None = None):
        self.folder, self.frequency, self.monitor = folder, frequency, monitor
        self.best = float("-inf")
        self._rng: dict[str, Any] | None = None

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._rng is not None:  # resumed: from here on as if nothing had happened
            restore_rng_state(self._rng)
            self._rng = None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor) if self.monitor else None
        # every rank takes part in saving, so rank 0, which measured, decides for all
        improved = trainer.strategy.broadcast(value is not None and float(value) > self.best)
        if improved:
            self.best = trainer.strategy.broadcast(float(value) if value is not None else self.best)
        finished = trainer.current_epoch + 1
        last = finished == trainer.max_epochs or trainer.global_step >= trainer.max_steps > 0
        if finished % self.frequency == 0 or last:
            self._save(trainer, self.folder.last_checkpoint)
        if improved:
            self._save(trainer, self.folder.best_checkpoint)

    @staticmethod
    def _save(trainer: pl.Trainer, path: Path) -> None:
        partial = path.with_name(path.name + ".part")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            os.replace(partial, path)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng_state()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._rng = checkpoint.get("rng")
