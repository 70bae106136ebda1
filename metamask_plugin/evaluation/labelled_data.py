"""The data an evaluator needs: labelled images, un-augmented, in a fixed order."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from omegaconf import OmegaConf
from torch.utils.data import DataLoader

from metamask_plugin.data import PretrainDataModule, load_dataset
from metamask_plugin.errors import UserError, check

READABLE_FORMATS = ("image_folder", "dali", None)
DATASET_KEYS = ("train_path", "val_path", "kwargs", "fraction", "download")


def merged_data(args: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The ``data`` node for an evaluation: what was asked for, over what the checkpoint was trained on.

    Paths and options of the training data are used for the same data set only. ``no_labels`` is not:
    an evaluation always reads labels.

    Args:
        args: the training config from ``args.json``, maybe empty.
        given: the ``data`` node that the user gave; keys that are None count as not given.

    Raises:
        UserError: when no data set is named, or its format cannot be read here.
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
    merged.pop("no_labels", None)
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
        dataset = load_dataset(data)
        remedy = "set data.val_path (main_knn.py: --val_data_path)"
        check(dataset.test is not None, f"data set {dataset.name}", "one with a test split", None, remedy)
        splits = {}
        for name in ("train", "test"):
            split = getattr(dataset, name)
            labelled = split.labels >= 0
            check(bool(labelled.any()), f"{name} images of {dataset.name}", "labelled", "none with a label")
            splits[name] = split if labelled.all() else split.subset(labelled.nonzero().flatten())
        entry = {"crop_size": crop_size, "num_crops": 1}
        entry.update({key: list(value) for key, value in (("mean", mean), ("std", std)) if value is not None})
        # the module checks a training batch size, which plays no part here
        cfg = {"data": dict(data), "augmentations": [entry], "optimizer": {"batch_size": 1}}
        self._module = PretrainDataModule(replace(dataset, **splits), OmegaConf.create(cfg))
        self._batch_size = batch_size
        self.num_classes = dataset.num_classes
        self.sizes = {name: len(split) for name, split in splits.items()}

    def evaluation_loader(self, split: str, batch_size: int | None = None) -> DataLoader:
        """Normalised images (B, 3, s, s) and labels (B,) of ``"train"`` or ``"test"``."""
        images = getattr(self._module.dataset, split)
        return self._module.evaluation_loader(images, batch_size or self._batch_size)
