"""The data an evaluator needs: labelled images, un-augmented, in a fixed order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils.data import DataLoader

from metamask_plugin.data import EvaluationView, ImageSplit, KorniaViews, TorchvisionViews, load_dataset
from metamask_plugin.data.loaders import (
    TrainingLoader,
    checked_workers,
    chosen_pipeline,
    evaluation_loader,
    training_loader,
)
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.registry import evaluation_resize
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


class LabelledData:
    """Training and test split as an evaluator sees them; unlabelled images are left out.

    Args:
        data: the ``data`` node of a config, see :func:`~metamask_plugin.data.load_dataset`.
        crop_size: side of the images, pixels.
        mean: per channel, for ``custom`` data; ImageNet's by default.
        std: per channel, for ``custom`` data.
        batch_size: images in a batch.

    Attributes:
        crop_size: as given.
        name: of the data set.
        num_classes: C.
        sizes: number of labelled images by split.

    Raises:
        UserError: when the data cannot be read, has no labels, or has no test split.
    """

    def __init__(
        self,
        data: Mapping[str, Any],
        crop_size: int,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        batch_size: int = 256,
    ):
        data = {key: value for key, value in data.items() if key not in REGION_KEYS}
        dataset = load_dataset(data)
        remedy = "set data.val_path (main_knn.py: --val_data_path)"
        check(dataset.test is not None, f"data set {dataset.name}", "one with a test split", None, remedy)
        splits = {}
        for name in ("train", "test"):
            split = getattr(dataset, name)
            labelled = split.labels >= 0
            check(bool(labelled.any()), f"{name} images of {dataset.name}", "labelled", "none with a label")
            splits[name] = split if labelled.all() else split.subset(labelled.nonzero().flatten())
        dataset = replace(dataset, **splits)
        if dataset.name == "custom":
            dataset = replace(dataset, mean=tuple(mean or dataset.mean), std=tuple(std or dataset.std))
        self._pipeline = chosen_pipeline(data, dataset.train)
        self._workers = checked_workers(data, self._pipeline)
        resize = evaluation_resize(dataset.name, crop_size, data.get("evaluation_resize"))
        self._view = EvaluationView(crop_size, dataset.mean, dataset.std, resize)
        self._full, self._dataset = prepared(dataset, data, resize, self._pipeline == "kornia")
        self._batch_size = batch_size
        self.crop_size = crop_size
        self.name = dataset.name
        self.num_classes = dataset.num_classes
        self.sizes = {name: len(self.images(name)) for name in splits}

    def evaluation_loader(
        self, split: str, batch_size: int | None = None, region: str = "full", form: str = "fill"
    ) -> DataLoader:
        """Normalised images (B, 3, s, s) and labels (B,), in a fixed order.

        Args:
            split: ``"train"`` or ``"test"``.
            batch_size: by default the one given at construction.
            region: what of the images is to be seen; the rest becomes the data set's mean, which is 0
                after normalisation. See :func:`~metamask_plugin.data.regions.region_of`.
            form: how a foreground is shown, ``"fill"`` or ``"zoom"``.

        Raises:
            UserError: for an unknown region or form, or images without foreground boxes.
        """
        if region == "full":  # these may lie decoded in memory
            images = self.images(split)
        else:
            self.require_boxes()
            images = region_of(getattr(self._full, split), region, self._full.mean, form)
        return evaluation_loader(images, self._view, batch_size or self._batch_size, self._workers)

    def images(self, split: str) -> ImageSplit:
        """The labelled images of ``"train"`` or ``"test"``, in the loaders' order."""
        return getattr(self._dataset, split)

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
        entry = {**view, "crop_size": self.crop_size, "num_crops": 1}
        draw = KorniaViews if self._pipeline == "kornia" else TorchvisionViews
        views = draw([entry], self._dataset.mean, self._dataset.std)
        return training_loader(images, views, batch_size, seed, self._workers, device)

    def require_boxes(self) -> None:
        """Raises a :class:`UserError` unless foreground and background of all images are known."""
        full = self._full
        without = [name for name in ("train", "test") if getattr(full, name).boxes is None]
        check(
            not without,
            f"data set {full.name}",
            "one with foreground boxes",
            f"none for its {' and '.join(without)} images",
            "take confounded_digits, coco, or tiny_imagenet with its box files",
        )
