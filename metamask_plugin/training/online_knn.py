"""kNN accuracy of the encoder while it trains, on un-augmented images."""

from collections.abc import Callable, Iterable, Sequence

import lightning.pytorch as pl

from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.knn import knn_table


class OnlineKNN(pl.Callback):
    """Logs ``knn5``, ``knn20`` ... and, for a method with a mask, ``knn5_masked`` ... each epoch.

    The paper evaluates unmasked features, the official MetaMask release masked ones: both are logged.

    Args:
        train_loader: makes an iterable over the labelled training images, as (X, targets).
        test_loader: the same for the test images.
        ks: numbers of neighbours.
        every_n_epochs: epochs between evaluations; the last epoch is always evaluated.
        temperature: of the neighbours' weights exp(cosine / T).
    """

    def __init__(
        self,
        train_loader: Callable[[], Iterable],
        test_loader: Callable[[], Iterable],
        ks: Sequence[int] = (5, 20, 200),
        every_n_epochs: int = 1,
        temperature: float = 0.07,
    ):
        self.train_loader, self.test_loader = train_loader, test_loader
        self.ks, self.every_n_epochs, self.temperature = tuple(ks), every_n_epochs, temperature

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        finished = trainer.current_epoch + 1
        due = finished % self.every_n_epochs == 0 or finished == trainer.max_epochs
        if not (due and trainer.is_global_zero):
            return
        train = extract_features(pl_module.backbone, self.train_loader(), device=pl_module.device)
        test = extract_features(pl_module.backbone, self.test_loader(), device=pl_module.device)
        mask = pl_module.mask.values().cpu() if hasattr(pl_module, "mask") else None
        accuracies = knn_table(train, test, mask=mask, ks=self.ks, temperature=self.temperature)
        pl_module.log_dict(accuracies, rank_zero_only=True)
