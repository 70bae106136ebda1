"""The labelled images of a run, un-augmented, as the evaluators want them."""

from collections.abc import Iterable

import torch

from metamask_plugin.audit.statistics import repeated
from metamask_plugin.data import PretrainDataModule
from metamask_plugin.data.fingerprint import fingerprint
from metamask_plugin.data.views import EvaluationView


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

    def fingerprint(self) -> str:
        """A short hash of which test images there are."""
        return fingerprint(self._data.full.test)

    @property
    def bank(self) -> int:
        """Number of the training images that kNN compares with."""
        return len(self._splits["train"])

    @property
    def originals(self) -> torch.Tensor | None:
        """What each test image shows, where several show the same."""
        return repeated(self._splits["test"].originals)

    @property
    def has_boxes(self) -> bool:
        """Whether foreground and background of both splits are known."""
        full = self._data.full
        return full.train.boxes is not None and full.test is not None and full.test.boxes is not None

    def evaluation_loader(
        self, split: str, batch_size: int = 256, region: str | None = None, form: str = "fill"
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Iterates over normalised images (B, 3, s, s) and labels (B,).

        Args:
            split: ``"train"`` or ``"test"``.
            batch_size: B.
            region: what of the images is to be seen; None for what the run trains on.
            form: see :func:`~metamask_plugin.data.regions.region_of`.
        """
        if region is None:
            return self._data.evaluation_loader(self._splits[split], batch_size)
        return self._data.region_loader(split, region, form, batch_size)

    def samples(self, count: int, crop_size: int | None = None) -> torch.Tensor:
        """The first ``count`` test images, normalised, (count, 3, s, s); s is the encoder's by default."""
        dataset, view = self._data.dataset, self._data.view
        if crop_size is not None:
            view = EvaluationView(crop_size, dataset.mean, dataset.std)
        test = self._splits["test"]
        return torch.stack([view(test.image(index)) for index in range(min(count, len(test)))])

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, s, s) as they look, in [0, 1]."""
        dataset = self._data.dataset
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (dataset.mean, dataset.std))
        return (images * std + mean).clamp(0, 1)
