"""Callbacks that observe a training: history, cost of data, online kNN, non-finite numbers, progress."""

import csv
import io
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler
from tqdm import tqdm

from metamask_plugin.errors import NonFiniteError
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.knn import knn_table
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.training.run_folder import RunFolder


class History(pl.Callback):
    """Collects each epoch's metrics in ``metrics.csv``. The checkpoint holds its rows.

    A resumed run therefore has its whole history. The file is rewritten each epoch.

    Args:
        folder: the run's folder.

    Attributes:
        rows: one dict an epoch: ``epoch`` (from 0), ``step``, and the logged metrics.
        masks: the mask after each epoch, shape (D,) each; empty for methods without one.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.masks: list[torch.Tensor] = []
        self._initial_mask: torch.Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if hasattr(pl_module, "mask") and self._initial_mask is None:  # not loaded from a checkpoint
            self._initial_mask = pl_module.mask.values().cpu().clone()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning keeps the last value of a metric; a row holds those of its own epoch
        trainer._logger_connector._callback_metrics.clear()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.rows and self.rows[-1]["epoch"] == epoch:  # max_steps had cut it short, now it is whole
            self.rows.pop()
            del self.masks[len(self.rows) :]
        pl_module.log("learning_rate", trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        row = {"epoch": epoch, "step": trainer.global_step, **metrics}
        if hasattr(pl_module, "mask"):
            self.masks.append(pl_module.mask.values().cpu().clone())
            row["mask_largest_movers"] = self._largest_movers()
        self.rows.append(row)
        if trainer.is_global_zero:
            self._write()

    def add(self, accuracies: dict[str, float]) -> None:
        """Adds what was measured of the last epoch after it was recorded."""
        self.rows[-1] |= accuracies
        self._write()

    def _largest_movers(self, count: int = 5) -> str:
        """The dimensions whose weight changed most in this epoch, e.g. ``17:+0.031 4:-0.028``."""
        before = self.masks[-2] if len(self.masks) > 1 else self._initial_mask
        change = self.masks[-1] - before
        movers = change.abs().topk(min(count, len(change))).indices.tolist()
        return " ".join(f"{i}:{change[i]:+.3f}" for i in movers)

    def _write(self) -> None:
        """Writes ``metrics.csv``; a metric that an epoch lacks is an empty cell."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in self.rows for key in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder.path / "metrics.csv", text.getvalue())

    def best(self, metric: str) -> dict[str, Any] | None:
        """The row with the highest ``metric``; ``None`` if no row has it."""
        rows = [row for row in self.rows if metric in row]
        return max(rows, key=lambda row: row[metric], default=None)

    def mean(self, metric: str) -> float | None:
        """The mean of ``metric`` over the epochs that have it; ``None`` if none has."""
        values = [row[metric] for row in self.rows if metric in row]
        return sum(values) / len(values) if values else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "masks": torch.stack(self.masks) if self.masks else None,
            "initial_mask": self._initial_mask,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])
        self.masks = [] if state["masks"] is None else list(state["masks"])
        self._initial_mask = state.get("initial_mask")


class DataWait(pl.Callback):
    """Logs an epoch's training time, and the share of it that the training waits for data.

    ``data_wait_share`` is w / (w + s). w is the time between the request for a batch and the batch's first
    hook: loading, the transfer to the device, the views. s is the time from there to the end of the batch's
    last hook, including the meta step. ``train_seconds`` is w + s of the epoch, ``train_cpu_seconds`` the
    processor time of this process (all threads, no workers) over the same spans. Validation, kNN and
    checkpoints count in none of them. An epoch's first batch counts, with the start of its workers. Batches
    that ``meta.when: epoch_end`` fetches after the epoch's last batch count to s. With several processes the
    largest values are logged. An epoch that is resumed within has the values of its rest.

    On the CPU, w is mostly the views of ``data.pipeline: kornia``, which is computation as much as waiting.
    On CUDA the host runs ahead of the device, so the times are those of events on the device: w is the time
    in which the device idles or makes views.

    Must stand before the callbacks that read the epoch's metrics.

    Attributes:
        clock: the ``profiler`` of the Trainer.
    """

    def __init__(self) -> None:
        self.clock = LoopClock()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.restart(trainer.strategy.root_device)

    on_train_start = on_train_epoch_start  # Lightning does not start an epoch that is resumed within

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        waiting, working = self.clock.seconds()
        total = waiting + working
        if total > 0:
            cost = {
                "data_wait_share": waiting / total,
                "train_seconds": total,
                "train_cpu_seconds": self.clock.processor_seconds,
            }
            pl_module.log_dict(cost, reduce_fx="max", sync_dist=trainer.world_size > 1)


class LoopClock(Profiler):
    """Takes the time of each batch at three of the marks that Lightning's loop sets for profilers.

    It is a profiler because no callback hook lies between a batch's last hook, which makes the meta step, and
    the request for the next batch.

    Attributes:
        processor_seconds: of all batches, from request to end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.restart(torch.device("cpu"))

    def restart(self, device: torch.device) -> None:
        """Forgets all batches; ``device`` computes the next ones."""
        self.device = device
        self._batches: list[tuple] = []
        self._asked = self._began = None
        self.processor_seconds = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._asked, self._processor = self._now(), time.process_time()
        elif action_name == "run_training_batch":
            self._began = self._now()

    def stop(self, action_name: str) -> None:
        of_module = action_name.startswith("[LightningModule]")
        last_hook = of_module and action_name.endswith(".on_train_batch_end")
        if last_hook and self._asked is not None and self._began is not None:
            self._batches.append((self._asked, self._began, self._now()))
            self.processor_seconds += time.process_time() - self._processor
            self._asked = self._began = None

    def seconds(self) -> tuple[float, float]:
        """Of all batches: from request to beginning, and from beginning to end."""
        if self.device.type == "cuda" and self._batches:
            self._batches[-1][-1].synchronize()
        waiting = sum(self._between(asked, began) for asked, began, _ in self._batches)
        working = sum(self._between(began, ended) for _, began, ended in self._batches)
        return waiting, working

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @staticmethod
    def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
        if isinstance(first, float):
            return second - first
        return first.elapsed_time(second) / 1000  # milliseconds


class OnlineKNN(pl.Callback):
    """Logs kNN accuracies of the encoder on un-augmented images: ``knn5``, ``knn20`` ... each epoch.

    For a method with a mask also ``knn5_masked`` ...: the paper evaluates unmasked features, the official
    MetaMask release masked ones. An epoch is saved before it is measured. If a run ends in between, it
    measures when it is resumed.

    Args:
        data: the run's labelled images.
        history: gets the accuracies; must stand before this callback.
        ks: numbers of neighbours.
        every_n_epochs: epochs between evaluations; the last epoch is always evaluated.
        temperature: of the votes exp(cosine / T); by default 1 for k = 5, else 0.07.

    Attributes:
        accuracies: of the current epoch, percent; empty if it was not evaluated.
    """

    def __init__(
        self,
        data: LabelledImages,
        history: History,
        ks: Sequence[int],
        every_n_epochs: int,
        temperature: float | None,
    ):
        self.data, self.history, self.ks = data, history, tuple(ks)
        self.every_n_epochs, self.temperature = every_n_epochs, temperature
        self.accuracies: dict[str, float] = {}
        self._resumed_at: int | None = None

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._resumed_at = checkpoint["global_step"]

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Measures the epoch of the checkpoint, unless that was done."""
        if self._resumed_at is None or not self.history.rows or not trainer.is_global_zero:
            return
        row = self.history.rows[-1]
        measured = any(name.startswith("knn") for name in row)
        of_these_weights = row["step"] == self._resumed_at
        if of_these_weights and not measured and self._is_due(trainer, row["epoch"] + 1, row["step"]):
            self._measure(pl_module)
            for logger in trainer.loggers:
                logger.log_metrics({**self.accuracies, "epoch": row["epoch"]}, row["step"])

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracies = {}
        if trainer.is_global_zero and self._is_due(trainer, trainer.current_epoch + 1, trainer.global_step):
            self._measure(pl_module)
            pl_module.log_dict(self.accuracies, rank_zero_only=True)

    def _is_due(self, trainer: pl.Trainer, epochs: int, steps: int) -> bool:
        last = epochs == trainer.max_epochs or steps >= trainer.max_steps > 0
        return epochs % self.every_n_epochs == 0 or last

    def _measure(self, pl_module: pl.LightningModule) -> None:
        train, test = (
            extract_features(pl_module.backbone, self.data.evaluation_loader(split), device=pl_module.device)
            for split in ("train", "test")
        )
        mask = pl_module.mask.values().cpu() if hasattr(pl_module, "mask") else None
        self.accuracies = knn_table(train, test, mask=mask, ks=self.ks, temperature=self.temperature)
        self.history.add(self.accuracies)


class NonFiniteReport(pl.Callback):
    """Writes ``nonfinite.json`` and ``nonfinite.ckpt`` when NaN or infinite numbers end a training.

    The first names what was seen and the batch's images; each of several processes writes its own images
    (``nonfinite_rank1.json``). The second is the state within that batch, for inspection: on the CPU the
    parameters are those before the step, on a GPU one step was made with these numbers. Training resumes from
    ``last.ckpt``.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        if not isinstance(exception, NonFiniteError):
            return
        rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
        write_summary(self.folder.path / f"nonfinite{rank}.json", _in_words(exception.seen))
        trainer.save_checkpoint(self.folder.path / "nonfinite.ckpt")
        if trainer.is_global_zero:
            print(
                f"state and images of that step: {self.folder.path / 'nonfinite.json'}, nonfinite.ckpt",
                flush=True,
            )


def _in_words(value: Any) -> Any:
    """Writes NaN and infinity as text: JSON has no numbers for them."""
    if isinstance(value, dict):
        return {key: _in_words(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_in_words(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


SHOWN = {
    "train_task_loss": "task",
    "train_redundancy_loss": "drr",
    "train_msr_loss": "msr",
    "train_trial_gain": "trial step gains",
    "mask_std": "mask_std",
    "msr_overlap": "overlap",
    "knn20": "knn20",
}
"""Epoch metrics that the progress shows, and their labels."""

WAITED_FROM = 0.05
"""The progress shows the share of an epoch spent waiting for data above this value."""


class Progress(pl.Callback):
    """Shows losses, kNN and the time left: as one bar on a terminal, else (logs, CI) as one line an epoch."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            resumed_at = trainer.fit_loop.epoch_loop.batch_progress.current.completed
            done = trainer.current_epoch * trainer.num_training_batches
            done += resumed_at % trainer.num_training_batches
            self.bar = tqdm(
                total=_epochs(trainer) * trainer.num_training_batches,
                initial=done,
                unit="step",
                dynamic_ncols=True,
                disable=not sys.stderr.isatty(),
                bar_format="{desc} {percentage:3.0f}% |{bar:20}| {elapsed}<{remaining}{postfix}",
            )
            self.started, self.first_epoch = time.monotonic(), trainer.current_epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self.bar is not None:
            self.bar.set_description_str(f"epoch {trainer.current_epoch + 1}/{_epochs(trainer)}")

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
            finished, epochs = trainer.current_epoch + 1, _epochs(trainer)
            elapsed = time.monotonic() - self.started
            left = elapsed / (finished - self.first_epoch) * (epochs - finished)
            values = "  ".join(f"{label} {value}" for label, value in shown.items())
            print(f"epoch {finished}/{epochs}  {values}  {left:.0f} s left", flush=True)

    def on_train_end(self, *_: Any) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    on_exception = on_train_end


def _epochs(trainer: pl.Trainer) -> int:
    """The run's epochs; max_steps may cut the last one short."""
    if trainer.max_steps <= 0:
        return trainer.max_epochs
    batches = trainer.max_steps * trainer.accumulate_grad_batches
    return min(trainer.max_epochs, math.ceil(batches / trainer.num_training_batches))
