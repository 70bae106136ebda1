"""One progress bar over the whole run: losses, kNN, time left."""

import math
import sys
import time

import lightning.pytorch as pl
from tqdm import tqdm

SHOWN = {
    "train_task_loss": "task",
    "train_redundancy_loss": "drr",
    "train_msr_loss": "msr",
    "train_trial_gain": "trial step gains",
    "mask_std": "mask_std",
    "msr_overlap": "overlap",
    "knn20": "knn20",
}
"""Epoch metrics that the bar shows, and how it calls them."""

WAITED_FROM = 0.05
"""Share of an epoch spent waiting for data from which on it is shown."""


class Progress(pl.Callback):
    """A bar on a terminal; elsewhere (logs, CI) one line an epoch."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            total = self._epochs(trainer) * trainer.num_training_batches
            resumed_at = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            done = trainer.current_epoch * trainer.num_training_batches
            done += resumed_at % trainer.num_training_batches
            self.bar = tqdm(
                total=total,
                initial=done,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                bar_format="{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}",
            )
            self.started, self.first_epoch = time.monotonic(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"epoch {trainer.current_epoch + 1}/{self._epochs(trainer)}")

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is None:
            return
        metrics = trainer.callback_metrics
        shown = {label: f"{float(metrics[key]):.4g}" for key, label in SHOWN.items() if key in metrics}
        waited = float(metrics.get("data_wait_share", 0))
        if waited > WAITED_FROM:
            shown["data_wait"] = f"{waited:.0%}"
        self.bar.set_postfix(shown, refresh=False)
        if self.bar.disable:
            finished = trainer.current_epoch + 1
            elapsed = time.monotonic() - self.started
            epochs = self._epochs(trainer)
            left = elapsed / (finished - self.first_epoch) * (epochs - finished)
            values = "  ".join(f"{label} {value}" for label, value in shown.items())
            print(f"epoch {finished}/{epochs}  {values}  {left:.0f} s left", flush=True)

    @staticmethod
    def _epochs(trainer: pl.Trainer) -> int:
        """The epochs that the run has, the last of them maybe cut short."""
        if trainer.max_steps <= 0:
            return trainer.max_epochs
        batches = trainer.max_steps * trainer.accumulate_grad_batches
        return min(trainer.max_epochs, math.ceil(batches / trainer.num_training_batches))

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
