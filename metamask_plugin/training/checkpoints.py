"""Checkpoints of a run: how they are written and read, what they hold, and when they are saved."""

import random
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch.optim.lr_scheduler import LambdaLR

from metamask_plugin.data.loaders import EpochPosition
from metamask_plugin.evaluation.checkpoints import check_records
from metamask_plugin.evaluation.files import remove_unfinished, replacing
from metamask_plugin.retry import retried
from metamask_plugin.signals import Preempted, Preemption
from metamask_plugin.training.callbacks import OnlineKNN
from metamask_plugin.training.ranks import of_all_ranks, of_this_rank
from metamask_plugin.training.run_folder import RunFolder, header_of


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint completely or not at all, and reads it without running code.

    If the process or the machine fails while writing, the path still holds the previous file. The previous
    ``last.ckpt`` is kept as ``previous.ckpt``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        remove_unfinished(path.parent)  # the leftovers of a killed process may fill the disk
        kept = path.with_name("previous.ckpt") if path.name == "last.ckpt" else None

        def write() -> None:
            with replacing(path, kept) as file:
                watched = _Watched(file)
                try:
                    torch.save(checkpoint, watched)
                except Exception:
                    if watched.error is not None:
                        raise watched.error from None
                    raise

        retried(write)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = lambda storage, _: storage, **_: Any
    ) -> dict[str, Any]:
        check_records(Path(path))
        return torch.load(path, map_location=map_location, weights_only=True)


class _Watched:
    """A file that keeps the error of a failed write: ``torch.save`` raises another one instead."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


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
    """Restores what :func:`rng_state` returned; CUDA's only on the same number of devices."""
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))


class Checkpointer(pl.Callback):
    """Saves ``last.ckpt`` every ``frequency`` epochs and after the last, and resumes exactly from it.

    It also saves every ``every_n_steps`` steps, and before a signal ends the run. Such a checkpoint is taken
    within an epoch, between two batches, and a resumed run continues with the next batch. The previous
    ``last.ckpt`` is kept as ``previous.ckpt``. Must stand behind the callbacks that record an epoch, and
    before those that evaluate it.

    Args:
        folder: the run's folder.
        position: of the run's data module.
        identity: the run's experiment, for the checkpoint to hold.
        frequency: epochs between checkpoints; None: saves nothing and leaves signals alone, but a resumed run
            still continues exactly.
        every_n_steps: optimiser steps between checkpoints within an epoch; None for none.

    Attributes:
        preemption: takes the signals while the run trains; None if nothing is to be saved.
    """

    def __init__(
        self,
        folder: RunFolder,
        position: EpochPosition,
        identity: dict[str, Any],
        frequency: int | None,
        every_n_steps: int | None = None,
    ):
        self.folder, self.position, self.identity = folder, position, identity
        self.frequency, self.every_n_steps = frequency, every_n_steps
        self.preemption = None if frequency is None else Preemption(lambda: position.waiting_for)
        self._rng: dict[str, Any] | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.preemption is not None:  # replaces Lightning's handlers, which end a run without saving it
            self.preemption.install()
        self._saved_at = trainer.global_step
        self.position.before_batch = lambda: self._between_batches(trainer)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.position.done:
            self._restore_rng()

    def _between_batches(self, trainer: pl.Trainer) -> None:
        """Restores the random numbers of a resumed epoch; saves and stops if that is due."""
        self._restore_rng()
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if batches.ready != batches.completed:
            return  # the meta steps of meta.when=epoch_end draw these batches, after the epoch's own
        if batches.completed % trainer.accumulate_grad_batches != 0:
            return  # gradients are not saved
        number = self._asked_to_stop(trainer)
        due = self.every_n_steps is not None and trainer.global_step - self._saved_at >= self.every_n_steps
        saved = self._saved_at == trainer.global_step
        within = 0 < batches.completed < trainer.num_training_batches
        if (due or number is not None) and within and trainer.lightning_module.resumes_within_epoch:
            self._save(trainer)
        elif number is not None and not saved and trainer.lightning_module.resumes_within_epoch:
            return  # before an epoch's first batch: the next call can save
        if number is not None:
            raise Preempted(number)

    def _asked_to_stop(self, trainer: pl.Trainer) -> int | None:
        """The signal upon which all processes stop now, or None. Every process must ask."""
        if self.preemption is None:
            return None
        received = self.preemption.received
        if trainer.world_size == 1:
            return received
        stops = trainer.strategy.reduce_boolean_decision(received is not None, all=False)
        return (received or signal.SIGTERM) if stops else None

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.frequency is None:
            return
        finished = trainer.current_epoch + 1
        last = finished == trainer.max_epochs or trainer.global_step >= trainer.max_steps > 0
        stopping = self._asked_to_stop(trainer) is not None
        if finished % self.frequency == 0 or last or stopping:
            self._save(trainer)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.preemption is not None:
            self.preemption.restore()
            number = self._asked_to_stop(trainer)
            if number is not None:  # everything is saved; the next start makes the final report
                raise Preempted(number)

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        if self.preemption is not None:
            self.preemption.restore()

    def _save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.folder.last_checkpoint)
        self._saved_at = trainer.global_step

    def _restore_rng(self) -> None:
        if self._rng is not None:
            restore_rng_state(self._rng)
            self._rng = None

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = of_all_ranks(rng_state())  # each rank draws its own numbers
        checkpoint["identity"] = self.identity
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed % trainer.num_training_batches
        checkpoint["batches_done"] = done
        if done:  # max_steps has cut the epoch short: a longer run finishes it
            epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]
            epochs["processed"] = epochs["completed"]

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._rng = of_this_rank(trainer, checkpoint.get("rng"))
        self.position.done = checkpoint.get("batches_done", 0)


class EpochMeans(pl.Callback):
    """Carries Lightning's running epoch metrics over an interruption within the epoch.

    Lightning saves its loops' counters but not these metrics, so their means would cover only the rest of
    the epoch. The saved value is added once a metric has been logged again, for one batch: sums are then
    formed in the same order and are bit-identical. Must stand before the callbacks that read the metrics.
    """

    def __init__(self) -> None:
        # of each metric the sum (or the maximum) so far and, for a mean, the number of samples
        self._pending: dict[str, tuple[torch.Tensor, torch.Tensor | None]] = {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._add(trainer)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if 0 < batches.completed < trainer.num_training_batches:
            logged = {
                key: (
                    metric.value.cpu(),
                    metric.cumulated_batch_size.cpu() if metric.meta.is_mean_reduction else None,
                )
                for key, metric in _accumulating(trainer)
            }
            # what is pending was loaded before and not logged since
            checkpoint["epoch_means"] = of_all_ranks({**self._pending, **logged})

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._pending = dict(of_this_rank(trainer, checkpoint.get("epoch_means")) or {})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._add(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer)
        for key, (value, count) in self._pending.items():  # logged only before the interruption
            mean = value if count is None else value / count
            pl_module.log(key.partition(".")[2], mean, sync_dist=trainer.world_size > 1)
        self._pending = {}

    def _add(self, trainer: pl.Trainer) -> None:
        if not self._pending:
            return
        for key, metric in _accumulating(trainer):
            if key not in self._pending:
                continue
            value, count = self._pending.pop(key)
            value = value.to(metric.value.device)
            if count is not None:
                metric.cumulated_batch_size = metric.cumulated_batch_size + count.to(metric.value.device)
            largest = metric.meta.is_max_reduction
            metric.value = torch.maximum(value, metric.value) if largest else value + metric.value
            metric._computed = None  # its cache


def _accumulating(trainer: pl.Trainer) -> list[tuple[str, Any]]:
    """Lightning's metrics of the running epoch that were logged in it and can be added."""
    return [
        (key, metric)
        for key, metric in trainer.fit_loop.epoch_loop._results.items()
        # an epoch that max_steps has cut short logs its end again once it is whole
        if metric.is_tensor and _was_logged(metric) and not key.startswith("on_train_epoch_end.")
    ]


def _was_logged(metric: Any) -> bool:
    # torchmetrics before 1.0 has the private name
    return metric.update_called if hasattr(metric, "update_called") else metric._update_called


class BestCheckpoint(pl.Callback):
    """Saves ``best/best.ckpt`` when kNN exceeds that of all epochs before. Must stand behind the kNN.

    ``last.ckpt`` records which epoch that was. On resuming, the record counts only if the file is there and
    at least as good by the same metric; otherwise the best of the following epochs is saved.

    Args:
        folder: the run's folder.
        knn: measures.
    """

    state_key = "BestCheckpoint"

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
        """Whether the epoch is the best so far. Rank 0 has measured, and every rank takes part in saving."""
        value, found = self.knn.accuracies.get(self.metric), None
        if value is not None and (self.best is None or value > self.best["value"]):
            found = {"metric": self.metric, "epoch": self.knn.history.rows[-1]["epoch"], "value": value}
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


class SettingsApply(pl.Callback):
    """Gives a resumed optimiser the settings of the config if the checkpoint has others.

    Loading a checkpoint replaces the config's learning rate, weight decay and the like. The start of the run
    reports such differences. This callback applies the config's values from the next step on, at the position
    of the schedule that the run has reached.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wanted = [
            [{key: value for key, value in group.items() if key != "params"} for group in one.param_groups]
            for one in trainer.optimizers
        ]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            return
        schedules = {
            id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs
        }
        for optimizer, wanted in zip(trainer.optimizers, self._wanted):
            groups, schedule = optimizer.param_groups, schedules.get(id(optimizer))
            rates = _base_rates(wanted)
            changed = _base_rates(groups) != rates
            for group, settings in zip(groups, wanted):
                group |= {key: value for key, value in settings.items() if key != "lr"}
            if schedule is not None:
                if not changed and not isinstance(schedule, LambdaLR):  # whose shape is the config's, too
                    continue
                schedule.base_lrs = rates
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch asks for get_last_lr, which knows the old rates
                    rates = list(getattr(schedule, "_get_closed_form_lr", schedule.get_lr)())
                schedule._last_lr = rates
            for group, rate in zip(groups, rates):
                group["lr"] = rate


def _base_rates(groups: list[dict[str, Any]]) -> list[float]:
    """Each group's learning rate before any schedule."""
    return [group.get("initial_lr", group["lr"]) for group in groups]
