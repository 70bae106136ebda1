"""Data sets by the name that ``data.dataset`` takes."""

import copy
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.data.datasets.coco import coco_splits
from metamask_plugin.data.datasets.confounded_digits import confounded_digits
from metamask_plugin.data.datasets.digits import digits
from metamask_plugin.data.datasets.folders import SET_PATH, FolderImages, folder_splits
from metamask_plugin.data.datasets.tiny_imagenet import tiny_imagenet_splits
from metamask_plugin.data.datasets.torchvision_sets import torchvision_splits
from metamask_plugin.data.memory import check_generated
from metamask_plugin.data.remarks import tell_shared, tell_unevaluated
from metamask_plugin.data.splits import (
    Dataset,
    FileImages,
    ImageSplit,
    MemoryImages,
    Splits,
    stratified_subset,
)
from metamask_plugin.errors import check, choose

IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# The values that solo-learn and most others normalise with.
MEAN_STD = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "stl10": ((0.4914, 0.4823, 0.4466), (0.2470, 0.2430, 0.2610)),
    "tiny_imagenet": ((0.480, 0.448, 0.398), (0.277, 0.269, 0.282)),
    "coco": IMAGENET_MEAN_STD,
    "imagenet100": IMAGENET_MEAN_STD,
    "imagenet": IMAGENET_MEAN_STD,
    "custom": IMAGENET_MEAN_STD,
}
# Of class folders under these names; with others it is another data set.
CLASSES = {
    "cifar10": 10,
    "cifar100": 100,
    "stl10": 10,
    "tiny_imagenet": 200,
    "imagenet100": 100,
    "imagenet": 1000,
}
# Of these solo-learn, as the literature, resizes to 256 and evaluates the centre of 224 pixels.
CENTRE_CROPPED = ("imagenet", "imagenet100", "tiny_imagenet", "coco", "custom")
CENTRE_CROP = 224 / 256
LARGEST_WHOLE = 96
# data.fraction keeps the same images whatever the run's seed, as in solo-learn: runs differ by training
# alone.
FRACTION_SEED = 0


def load_dataset(data_cfg: DictConfig | Mapping[str, Any]) -> Dataset:
    """Builds the data set that the ``data`` node of the configuration asks for.

    Keys: ``dataset`` (one of :data:`DATASETS`), ``train_path`` and ``val_path`` (where files are read),
    ``download`` (False), ``fraction`` (share of the training images, the same of every class; -1 for all),
    ``no_labels`` (False; training labels become -1, and a ``custom`` training folder needs no class folders
    and has no test split), ``bits`` (that 16-bit grey uses; None for 16) and ``kwargs`` (options of the
    generated sets; ``train_annotations`` and ``val_annotations``, the box files of ``coco``). Other keys are
    left to others; files are verified by :func:`~metamask_plugin.data.verify.prepared`.

    The images are always full ones: ``region`` (``full``, ``foreground`` or ``background``) and
    ``region_form`` (``fill`` or ``zoom``) are applied later, too.

    Mean and std are ``mean`` and ``std`` where they are given, else the data set's own; for ``custom`` they
    are ImageNet's here, and ``PretrainDataModule`` takes ``augmentations.0.mean`` and ``.std`` where those
    are given.

    Raises:
        UserError: an unknown name or option, a value out of range, or files that are not as they should be.
    """
    node = (
        OmegaConf.to_container(data_cfg, resolve=True) if isinstance(data_cfg, DictConfig) else dict(data_cfg)
    )
    name = choose("data.dataset", node.get("dataset"), DATASETS)
    train, test = DATASETS[name](node)
    if test is not None:
        _require_same_classes(train, test)
    _require_class_count(name, train)
    tell_shared(train, test)
    tell_unevaluated(node, train, test)
    mean, std = _configured_mean_std(node) or MEAN_STD.get(name) or _measured_mean_std(train)
    fraction = -1 if node.get("fraction") is None else node["fraction"]
    if fraction != -1:
        train = stratified_subset(train, fraction, FRACTION_SEED)
    if node.get("no_labels"):
        train = copy.copy(train)
        train.labels = torch.full_like(train.labels, -1)
    dataset = Dataset(name, train, test, max(1, len(train.classes)), mean, std)
    return dataset if node.get("bits") is None else _with_bits(dataset, node["bits"])


def evaluation_resize(name: str, crop_size: int, given: int | None = None) -> int:
    """Pixels that the shorter side is resized to before the evaluation's centre crop.

    By default as in solo-learn: 256 for a crop of 224 of ImageNet, its subsets and ``custom``, and as much
    larger than any other crop; the crop itself up to 96 pixels, and for data sets of small images.

    Args:
        name: of the data set.
        crop_size: of the evaluation.
        given: ``data.evaluation_resize``.

    Raises:
        UserError: it is smaller than the crop.
    """
    if given is None:
        whole = name not in CENTRE_CROPPED or crop_size <= LARGEST_WHOLE
        return crop_size if whole else round(crop_size / CENTRE_CROP)
    check(
        given >= crop_size,
        "data.evaluation_resize",
        f"a whole number of at least the crop size {crop_size}",
        given,
        "null is solo-learn's, the crop size itself shows the whole image",
    )
    return given


def _with_bits(dataset: Dataset, bits: Any) -> Dataset:
    files = {
        name: copy.copy(split) for name, split in dataset.splits.items() if isinstance(split, FileImages)
    }
    check(bool(files), "data.bits", f"null for {dataset.name}, whose images are no files", bits)
    for split in files.values():
        split.bits = bits
    return replace(dataset, **files)


def _require_class_count(name: str, train: ImageSplit) -> None:
    expected = CLASSES.get(name)
    check(
        expected is None or not isinstance(train, FolderImages) or len(train.classes) == expected,
        "data.train_path",
        f"a folder of {expected} class folders for data.dataset={name}",
        len(train.classes),
        "set data.dataset=custom",
    )


def _generated(build: Callable[..., Splits], node: Mapping[str, Any]) -> Splits:
    options = dict(node.get("kwargs") or {})
    for option in options:
        choose(f"data.kwargs key of {build.__name__}", option, inspect.signature(build).parameters)
    check_generated(options)
    return build(**options)


def _torchvision(name: str, node: Mapping[str, Any]) -> Splits:
    return torchvision_splits(name, node.get("train_path"), node.get("val_path"), bool(node.get("download")))


def _folders(node: Mapping[str, Any]) -> Splits:
    return folder_splits(node.get("train_path"), node.get("val_path"))


def _tiny_imagenet(node: Mapping[str, Any]) -> Splits:
    return tiny_imagenet_splits(node.get("train_path"), node.get("val_path"))


def _coco(node: Mapping[str, Any]) -> Splits:
    options = dict(node.get("kwargs") or {})
    for option in options:
        choose("data.kwargs key of coco", option, ("train_annotations", "val_annotations"))
    return coco_splits(node.get("train_path"), node.get("val_path"), **options)


def _custom(node: Mapping[str, Any]) -> Splits:
    if not node.get("no_labels"):
        return _folders(node)
    path = node.get("train_path")
    check(bool(path), "data.train_path", "a folder of images", path, SET_PATH)
    return FolderImages.unlabelled(path), None


def _require_same_classes(train: ImageSplit, test: ImageSplit) -> None:
    odd = sorted(set(train.classes) ^ set(test.classes))
    where = "training" if odd and odd[0] in train.classes else "test"
    check(
        train.classes == test.classes,
        "data.val_path",
        f"a folder with the training split's {len(train.classes)} classes",
        f"{len(test.classes)} classes, {odd[0]!r} only in the {where} split" if odd else "another order",
        "make the class folders' names agree",
    )


def _configured_mean_std(node: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    mean, std = node.get("mean"), node.get("std")
    check((mean is None) == (std is None), "data.mean and data.std", "given both or neither", (mean, std))
    return None if mean is None else (tuple(mean), tuple(std))


def _measured_mean_std(split: MemoryImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    pixels = split.images.double() / 255
    mean, std = pixels.mean((0, 2, 3)), pixels.std((0, 2, 3), correction=0)
    return tuple(mean.tolist()), tuple(std.tolist())


DATASETS: dict[str, Callable[[Mapping[str, Any]], Splits]] = {
    "digits": partial(_generated, digits),
    "confounded_digits": partial(_generated, confounded_digits),
    "cifar10": partial(_torchvision, "cifar10"),
    "cifar100": partial(_torchvision, "cifar100"),
    "stl10": partial(_torchvision, "stl10"),
    "tiny_imagenet": _tiny_imagenet,
    "coco": _coco,
    "imagenet100": _folders,
    "imagenet": _folders,
    "custom": _custom,
}

ABOUT = {
    "digits": "scikit-learn's digits, bundled",
    "confounded_digits": "digits on photographs, background tied to class in training; generated; boxes",
    "cifar10": "torchvision's files or class folders",
    "cifar100": "torchvision's files or class folders",
    "stl10": "torchvision's files or class folders",
    "tiny_imagenet": "the download as it is; boxes",
    "coco": "images with one object of ICL-MSR's 30 classes; boxes",
    "imagenet100": "class folders",
    "imagenet": "class folders",
    "custom": "any class folders, or images without labels",
}
"""What each is, in a line."""
