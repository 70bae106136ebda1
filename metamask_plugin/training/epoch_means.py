"""An epoch's means where the epoch is resumed in its middle."""

from typing import Any

import lightning.pytorch as pl
import torch

from metamask_plugin.training.ranks import of_all_ranks, of_this_rank

Running = dict[str, tuple[torch.Tensor, torch.Tensor | None]]
"""Of each metric the sum (or the largest) so far and, of a mean, the samples that it is over."""

AT_THE_END = "on_train_epoch_end."
"""Of what is logged once an epoch: one that max_steps has cut short is logged again when it is whole."""


class EpochMeans(pl.Callback):
    """Carries what Lightning has accumulated of an epoch's metrics into the run that goes on with the epoch.

    Lightning saves its loops' counters, but of the metrics between two logs nothing: means would be those of
    the rest of the epoch. What was saved is added once a metric has been logged again, for one batch, so that
    sums are formed in the same order, and are the same to the last bit. Must stand before what reads the
    epoch's metrics.
    """

    def __init__(self) -> None:
        self._pending: Running = {}

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._add(trainer)
        batches = trainer.fit_loop.epoch_loop.batch_progress.current
        if 0 < batches.completed < trainer.num_training_batches:
            checkpoint["epoch_means"] = of_all_ranks(
                {
                    **self._pending,  # resumed before, and not logged since
                    **{
                        key: (
                            metric.value.cpu(),
                            metric.cumulated_batch_size.cpu() if _is_mean(metric) else None,
                        )
                        for key, metric in _accumulating(trainer)
                    },
                }
            )

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._pending = dict(of_this_rank(trainer, checkpoint.get("epoch_means")) or {})

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._add(trainer)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._add(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._add(trainer)
        for key, (value, count) in self._pending.items():  # logged before the interruption alone
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
            if _is_mean(metric):
                metric.cumulated_batch_size = metric.cumulated_batch_size + count.to(metric.value.device)
            largest = metric.meta.is_max_reduction
            metric.value = torch.maximum(value, metric.value) if largest else value + metric.value
            metric._computed = None  # its cache


def _accumulating(trainer: pl.Trainer) -> list[tuple[str, Any]]:
    """Lightning's metrics of the running epoch that have been logged in it; of a kind that can be added."""
    metrics = trainer.fit_loop.epoch_loop._results.items()
    return [
        (key, metric)
        for key, metric in metrics
        if metric.is_tensor and _was_logged(metric) and not key.startswith(AT_THE_END)
    ]


def _is_mean(metric: Any) -> bool:
    return metric.meta.is_mean_reduction


def _was_logged(metric: Any) -> bool:
    # torchmetrics before 1.0 has it under another name
    return metric.update_called if hasattr(metric, "update_called") else metric._update_called
