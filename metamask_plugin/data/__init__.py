"""Data sets, views and the batches made of them."""

from metamask_plugin.data.augmentations import Augmentation, parse_augmentations
from metamask_plugin.data.confounded_digits import ConfoundedImages, confounded_digits
from metamask_plugin.data.datamodule import PretrainDataModule
from metamask_plugin.data.digits import digits
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.registry import DATASETS, Dataset, load_dataset
from metamask_plugin.data.splits import (
    FileImages,
    FolderImages,
    ImageSplit,
    MemoryImages,
    UnreadableImage,
    stratified_subset,
)
from metamask_plugin.data.views import EvaluationView, KorniaViews, TorchvisionViews

__all__ = [
    "DATASETS",
    "Augmentation",
    "ConfoundedImages",
    "Dataset",
    "EvaluationView",
    "FileImages",
    "FolderImages",
    "ImageSplit",
    "KorniaViews",
    "MemoryImages",
    "PretrainDataModule",
    "TorchvisionViews",
    "UnreadableImage",
    "confounded_digits",
    "digits",
    "load_dataset",
    "parse_augmentations",
    "region_of",
    "stratified_subset",
]
