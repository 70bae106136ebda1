"""Checkpoints from which a run goes on as if it had never stopped."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch

from metamask_plugin.data.batches import EpochPosition
from metamask_plugin.signals import Preempted
from metamask_plugin.training.checkpoint_header import BEST, header_of
from metamask_plugin.training.online_knn import OnlineKNN
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
    """Saves ``last.ckpt`` every ``frequency`` epochs and after the last.

    Also every ``every_n_steps`` steps and before a preemption ends the run: then in the middle of an epoch,
    between two batches, from where the epoch goes on with the batch that comes next. The one before the last
    stays as ``previous.ckpt``. A checkpoint says of which experiment it is. Must stand behind the callbacks
    that record an epoch, and before those that evaluate it.

    Args:
        folder: the run's folder.
        frequency: epochs between checkpoints; None: none is saved, and a resumed run goes on exactly.
        position: of the run's data module.
        preemption: what watches for signals; None for nothing.
        every_n_steps: optimiser steps between checkpoints within an epoch; None for none.
        identity: what the checkpoint is to say of the run it is of, in plain values.
    """

    def __init__(
        self,
        folder: RunFolder,
        frequency: int | None = 1,
        position: EpochPosition | None = None,
        preemption: Preemption | None = None,
        every_n_steps: int | None = None,
        identity: dict[str, Any] | None = None,
    ):
        self.folder, self.frequency = folder, frequency
        self.position, self.preemption, self.every_n_steps = position, preemption, every_n_steps
        self.identity = identity or {}
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
            return  # not between two of the epoch's batches: the meta steps of meta.when=epoch_end draw these
        accumulating = batches.completed % trainer.accumulate_grad_batches != 0
        if accumulating:  # gradients are not saved
            return
        number = None if self.preemption is None else self.preemption.asked_to_stop(trainer)
        due = self.every_n_steps is not None and trainer.global_step - self._saved_at >= self.every_n_steps
        saved = self._saved_at == trainer.global_step
        within = 0 < batches.completed < trainer.num_training_batches
        if (due or number is not None) and within and trainer.lightning_module.resumes_within_epoch:
            self._save(trainer)
        elif number is not None and not saved and trainer.lightning_module.resumes_within_epoch:
            return  # before an epoch's first batch: there will be something to save after it
        if number is not None:
            raise Preempted(number)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.frequency is None:
            return
        finished = trainer.current_epoch + 1
        last = finished == trainer.max_epochs or trainer.global_step >= trainer.max_steps > 0
        stopping = self.preemption is not None and self.preemption.asked_to_stop(trainer) is not None
        if finished % self.frequency == 0 or last or stopping:
            self._save(trainer)

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder.last_checkpoint)
        self._saved_at = trainer.global_step

    def _restore_rng(self) -> None:
        if self._rng is not None:
            restore_rng_state(self._rng)
            self._rng = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = of_all_ranks(rng_state())  # each draws numbers of its own
        checkpoint["identity"] = self.identity
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.num_training_batches
        checkpoint["batches_done"] = done
        if done:  # max_steps has cut the epoch short: it is not over for a run that goes on
            epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
            epochs["processed"] = epochs["completed"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._rng = of_this_rank(trainer, checkpoint.get("rng"))
        if self.position is not None:
            self.position.done = checkpoint.get("batches_done", 0)


class BestCheckpoint(pl.Callback):
    """Saves ``best/best.ckpt`` when kNN is higher than in all epochs before. Must stand behind the kNN.

    Which epoch that was is in ``last.ckpt``, too. It counts where the file is there and at least as good by
    the same measure: else the best of the epochs to come is saved.

    Args:
        folder: the run's folder.
        knn: measures.
    """

    state_key = BEST

    def __init__(self, folder: RunFolder, knn: OnlineKNN):
        self.folder, self.knn = folder, knn
        self.metric = f"knn{knn.ks[0]}"
        self.best: dict[str, Any] | None = None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Saves the checkpoint that the run resumes from, if it was measured just now and is the best."""
        # a finished run is only reported: its best epoch stays, whatever this report measures
        finished = trainer.strategy.broadcast(self.folder.is_finished)
        if not finished and self._improved(trainer):
            state = trainer.strategy.checkpoint_io.load_checkpoint(trainer.ckpt_path)
            states = {callback.state_key: callback.state_dict() for callback in trainer.callbacks}
            state["callbacks"] = {key: value for key, value in states.items() if value}
            if trainer.is_global_zero:
                trainer.strategy.checkpoint_io.save_checkpoint(state, self.folder.best_checkpoint)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._improved(trainer):
            trainer.save_checkpoint(self.folder.best_checkpoint)

    def _improved(self, trainer: pl.Trainer) -> bool:
        """Whether the epoch is the best so far. Every rank takes part in saving; rank 0 has measured."""
        value = self.knn.accuracies.get(self.metric)
        if value is not None and (self.best is None or value > self.best["value"]):
            epoch = self.knn.history.rows[-1]["epoch"]
            found = {"metric": self.metric, "epoch": epoch, "value": value}
        else:
            found = None
        found = trainer.strategy.broadcast(found)
        self.best = found or self.best
        return found is not None

    def state_dict(self) -> dict[str, Any]:
        return self.best or {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        header = header_of(self.folder.best_checkpoint)
        saved = header and header.best
        comparable = saved is not None and saved["metric"] == state["metric"] == self.metric
        self.best = dict(state) if comparable and saved["value"] >= state["value"] else None
