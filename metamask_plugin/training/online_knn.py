"""kNN accuracy of the encoder while it trains, on un-augmented images."""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl

from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.knn import knn_table
from metamask_plugin.training.evaluation_data import EvaluationData
from metamask_plugin.training.history import History, is_knn


class OnlineKNN(pl.Callback):
    """Logs ``knn5``, ``knn20`` ... and, for a method with a mask, ``knn5_masked`` ... each epoch.

    The paper evaluates unmasked features, the official MetaMask release masked ones: both are logged.

    An epoch is saved before it is measured. Where a run ends in between, it measures when it is resumed.

    Args:
        data: the run's labelled images.
        history: gets the accuracies; must stand before this callback.
        ks: numbers of neighbours.
        every_n_epochs: epochs between evaluations; the last epoch is always evaluated.
        temperature: of the votes exp(cosine / T); by default 1 for k = 5, else 0.07.

    Attributes:
        accuracies: what the current epoch measured, percent; empty if it was not evaluated.
    """

    def __init__(
        self,
        data: EvaluationData,
        history: History,
        ks: Sequence[int] = (5, 20, 200),
        every_n_epochs: int = 1,
        temperature: float | None = None,
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
        measured = any(is_knn(name) for name in row)
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
