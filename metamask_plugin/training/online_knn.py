"""kNN accuracy of the encoder while it trains, on un-augmented images."""

from collections.abc import Sequence

import lightning.pytorch as pl

from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.knn import knn_table
from metamask_plugin.training.evaluation_data import EvaluationData


class OnlineKNN(pl.Callback):
    """Logs ``knn5``, ``knn20`` ... and, for a method with a mask, ``knn5_masked`` ... each epoch.

    The paper evaluates unmasked features, the official MetaMask release masked ones: both are logged.

    Args:
        data: the run's labelled images.
        ks: numbers of neighbours.
        every_n_epochs: epochs between evaluations; the last epoch is always evaluated.
        temperature: of the votes exp(cosine / T); by default 1 for k = 5, else 0.07.

    Attributes:
        accuracies: what the current epoch measured, percent; empty if it was not evaluated.
    """

    def __init__(
        self,
        data: EvaluationData,
        ks: Sequence[int] = (5, 20, 200),
        every_n_epochs: int = 1,
        temperature: float | None = None,
    ):
        self.data, self.ks = data, tuple(ks)
        self.every_n_epochs, self.temperature = every_n_epochs, temperature
        self.accuracies: dict[str, float] = {}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.accuracies = {}
        finished = trainer.current_epoch + 1
        due = finished % self.every_n_epochs == 0 or finished == trainer.max_epochs
        if not (due and trainer.is_global_zero):
            return
        train, test = (
            extract_features(pl_module.backbone, self.data.evaluation_loader(split), device=pl_module.device)
            for split in ("train", "test")
        )
        mask = pl_module.mask.values().cpu() if hasattr(pl_module, "mask") else None
        self.accuracies = knn_table(train, test, mask=mask, ks=self.ks, temperature=self.temperature)
        pl_module.log_dict(self.accuracies, rank_zero_only=True)
