"""The labelled images of a run, un-augmented, as the evaluators want them."""

from collections.abc import Iterable

import torch

from metamask_plugin.data import PretrainDataModule


class EvaluationData:
    """Train and test images by name; training images without a label (STL-10's) are left out.

    Args:
        data: the run's data module.
    """

    def __init__(self, data: PretrainDataModule):
        self._data = data
        train = data.dataset.train
        labelled = train.labels >= 0
        self._splits = {
            "train": train if labelled.all() else train.subset(labelled.nonzero()[:, 0]),
            "test": data.dataset.test,
        }

    @property
    def available(self) -> bool:
        """Whether there is anything to evaluate with: labelled training images and test images."""
        return len(self._splits["train"]) > 0 and self._splits["test"] is not None

    def evaluation_loader(
        self, split: str, batch_size: int = 256
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Iterates over normalised images (B, 3, s, s) and labels (B,) of ``"train"`` or ``"test"``."""
        return self._data.evaluation_loader(self._splits[split], batch_size)
