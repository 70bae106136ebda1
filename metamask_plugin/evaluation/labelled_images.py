"""Labelled images as evaluators see them: un-augmented, in a fixed order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from metamask_plugin.audit.statistics import repeated
from metamask_plugin.data import (
    EvaluationView,
    ImageSplit,
    KorniaViews,
    PretrainDataModule,
    TorchvisionViews,
    load_dataset,
    parse_augmentations,
)
from metamask_plugin.data.loaders import (
    TrainingLoader,
    checked_workers,
    chosen_pipeline,
    evaluation_loader,
    training_loader,
)
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.registry import Dataset, evaluation_resize
from metamask_plugin.data.splits import fingerprint
from metamask_plugin.data.verify import prepared
from metamask_plugin.errors import UserError, check

READABLE_FORMATS = ("image_folder", "dali", None)
DATASET_KEYS = (
    "train_path",
    "val_path",
    "kwargs",
    "fraction",
    "download",
    "verify",
    "invalid_images",
    "mean",
    "std",
    "bits",
    "evaluation_resize",
)
# what an encoder saw of its images; an evaluation reads them whole and cuts out regions itself
REGION_KEYS = ("region", "region_form")


def merged_data(args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``data`` node for an evaluation: what was asked for, over what the checkpoint was trained on.

    Paths and options of the training data are used for the same data set only. ``no_labels`` and
    ``region`` are not: an evaluation always reads labels, and full images.

    Args:
        args: the training config from ``args.json``, maybe empty.
        given: the ``data`` node that the user gave; keys that are None count as not given.

    Raises:
        UserError: when no data set is named, its format cannot be read here, or a region is asked for.

    Example:
        >>> trained = {"data": {"dataset": "digits", "kwargs": {"size": 16}, "no_labels": True}}
        >>> merged_data(trained, {"num_workers": 0})
        {'kwargs': {'size': 16}, 'dataset': 'digits', 'num_workers': 0}
    """
    given = {key: value for key, value in given.items() if value is not None}
    trained_on = args.get("data") or {}
    name = given.get("dataset", trained_on.get("dataset"))
    check(name is not None, "data.dataset", "given, as no args.json beside the checkpoint names it", None)
    merged = {"dataset": name, "num_workers": trained_on.get("num_workers"), **given}
    if name == trained_on.get("dataset"):
        merged = {**{key: trained_on[key] for key in DATASET_KEYS if key in trained_on}, **merged}
        if "kwargs" in given:
            merged["kwargs"] = {**(trained_on.get("kwargs") or {}), **given["kwargs"]}
    # NVIDIA DALI reads the same folders of images; here torchvision does
    if merged.get("format") not in READABLE_FORMATS:
        raise UserError(
            f"data.format must be image_folder or dali for this evaluator, got {merged['format']!r}; "
            "unpack the images into one folder a class, or use solo-learn's own evaluation"
        )
    check(
        given.get("region", "full") == "full",
        "data.region",
        "full for this evaluator",
        given.get("region"),
        "main_foreground.py tests on foregrounds and backgrounds",
    )
    for key in ("no_labels", *REGION_KEYS):
        merged.pop(key, None)
    return merged


class LabelledImages:
    """Training and test images with labels; those without a label are left out.

    Args:
        dataset: the images to evaluate on.
        view: what an encoder is shown of an image.
        full: the same data set, full images, where ``dataset`` shows one region of them.
        pipeline: ``kornia`` or ``torchvision``: what draws the views of :meth:`augmented`.
        num_workers: processes that decode image files.
        batch_size: of the loaders, unless they are asked for another.

    Attributes:
        name: of the data set.
        num_classes: C.
        sizes: number of labelled images by split; without ``test`` where there are no test images.

    Example:
        >>> images = LabelledImages.read({"dataset": "digits", "kwargs": {"size": 16}}, crop_size=16)
        >>> images.sizes, images.num_classes
        ({'train': 1297, 'test': 500}, 10)
        >>> x, y = next(iter(images.evaluation_loader("test", batch_size=32)))
        >>> x.shape, y.shape
        (torch.Size([32, 3, 16, 16]), torch.Size([32]))
    """

    def __init__(
        self,
        dataset: Dataset,
        view: EvaluationView,
        full: Dataset | None = None,
        pipeline: str = "torchvision",
        num_workers: int = 0,
        batch_size: int = 256,
    ):
        self._dataset, self._view, self._full = dataset, view, full or dataset
        self._pipeline, self._workers, self._batch_size = pipeline, num_workers, batch_size
        self._splits = {name: _labelled(split) for name, split in dataset.splits.items()}
        self.name, self.num_classes = dataset.name, dataset.num_classes
        self.sizes = {name: len(split) for name, split in self._splits.items()}

    @classmethod
    def read(
        cls,
        data: Mapping[str, Any],
        crop_size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 256,
    ) -> "LabelledImages":
        """Reads what the ``data`` node of a config names, full images; image files are verified first.

        Args:
            data: see :func:`~metamask_plugin.data.load_dataset`.
            crop_size: side of the images, pixels.
            mean: per channel, for ``custom`` data; ImageNet's by default.
            std: per channel, for ``custom`` data.
            batch_size: images in a batch.

        Raises:
            UserError: when the data cannot be read, has no labels, or has no test split.
        """
        given = {key: list(value) for key, value in (("mean", mean), ("std", std)) if value is not None}
        parse_augmentations([{"crop_size": crop_size, **given}])  # which checks them
        data = {key: value for key, value in data.items() if key not in REGION_KEYS}
        dataset = load_dataset(data)
        remedy = "set data.val_path (main_knn.py: --val_data_path)"
        check(dataset.test is not None, f"data set {dataset.name}", "one with a test split", None, remedy)
        splits = {name: _labelled(split) for name, split in dataset.splits.items()}
        for name, split in splits.items():
            check(len(split) > 0, f"{name} images of {dataset.name}", "labelled", "none with a label")
        dataset = replace(dataset, **splits)
        if dataset.name == "custom":
            dataset = replace(dataset, **{key: tuple(value) for key, value in given.items()})
        pipeline = chosen_pipeline(data, dataset.train)
        workers = checked_workers(data, pipeline)
        resize = evaluation_resize(dataset.name, crop_size, data.get("evaluation_resize"))
        view = EvaluationView(crop_size, dataset.mean, dataset.std, resize)
        full, dataset = prepared(dataset, data, resize, pipeline == "kornia")
        return cls(dataset, view, full, pipeline, workers, batch_size)

    @classmethod
    def of_run(cls, data: PretrainDataModule) -> "LabelledImages":
        """The images of a run, as it sees them."""
        return cls(data.dataset, data.view, data.full, num_workers=data.num_workers)

    @property
    def available(self) -> bool:
        """Whether there is anything to evaluate with: labelled training images and test images."""
        return self.sizes["train"] > 0 and "test" in self.sizes

    @property
    def originals(self) -> torch.Tensor | None:
        """What each test image shows, (N,), where several show the same."""
        return repeated(self._splits["test"].originals)

    @property
    def has_boxes(self) -> bool:
        """Whether foreground and background of all images are known."""
        return not self._without_boxes()

    def fingerprint(self) -> str:
        """A short hash of which test images there are."""
        return fingerprint(self._full.test)

    def images(self, split: str) -> ImageSplit:
        """The labelled images of ``"train"`` or ``"test"``, in the loaders' order."""
        return self._splits[split]

    def evaluation_loader(
        self, split: str, batch_size: int | None = None, region: str | None = None, form: str = "fill"
    ) -> DataLoader:
        """Normalised images (B, 3, s, s) and labels (B,), in a fixed order.

        Args:
            split: ``"train"`` or ``"test"``.
            batch_size: by default the one given at construction.
            region: what of the full images is to be seen; the rest becomes the data set's mean, which is 0
                after normalisation. See :func:`~metamask_plugin.data.regions.region_of`. None for the
                images of ``dataset``.
            form: how a foreground is shown, ``"fill"`` or ``"zoom"``.

        Raises:
            UserError: for an unknown region or form, or images without foreground boxes.
        """
        images = self._splits[split]
        if region is not None:
            if region != "full":
                self.require_boxes()
            images = region_of(_labelled(getattr(self._full, split)), region, self._full.mean, form)
        return evaluation_loader(images, self._view, batch_size or self._batch_size, self._workers)

    def augmented(
        self,
        images: ImageSplit,
        view: Mapping[str, Any],
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> TrainingLoader:
        """Batches for a supervised training: indexes, one augmented view of each image, labels.

        Args:
            images: labelled training images, some or all of :meth:`images`.
            view: an entry of solo-learn's ``augmentations``, without ``crop_size``.
            batch_size: at most as many as there are images.
            seed: of the images' order.
            device: where the batches are to lie.
        """
        entry = {**view, "crop_size": self._view.crop_size, "num_crops": 1}
        draw = KorniaViews if self._pipeline == "kornia" else TorchvisionViews
        views = draw([entry], self._dataset.mean, self._dataset.std)
        return training_loader(images, views, batch_size, seed, self._workers, device)

    def samples(self, count: int, crop_size: int | None = None) -> torch.Tensor:
        """The first ``count`` test images, normalised, (count, 3, s, s); s is the loaders' by default."""
        view, test = self._view, self._splits["test"]
        if crop_size is not None:
            view = EvaluationView(crop_size, self._dataset.mean, self._dataset.std)
        return torch.stack([view(test.image(index)) for index in range(min(count, len(test)))])

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """Normalised images (B, 3, s, s) as they look, in [0, 1]."""
        mean, std = (
            torch.tensor(values).view(1, 3, 1, 1) for values in (self._dataset.mean, self._dataset.std)
        )
        return (images * std + mean).clamp(0, 1)

    def require_boxes(self) -> None:
        """Raises a :class:`UserError` unless foreground and background of all images are known."""
        without = self._without_boxes()
        check(
            not without,
            f"data set {self.name}",
            "one with foreground boxes",
            f"none for its {' and '.join(without)} images",
            "take confounded_digits, coco, or tiny_imagenet with its box files",
        )

    def _without_boxes(self) -> list[str]:
        splits = self._full.splits
        return [name for name in ("train", "test") if name not in splits or splits[name].boxes is None]


def _labelled(split: ImageSplit) -> ImageSplit:
    labelled = split.labels >= 0
    return split if labelled.all() else split.subset(labelled.nonzero().flatten())
