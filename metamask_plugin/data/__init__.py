"""Data sets, views and the batches made of them."""

from metamask_plugin.data.datamodule import PretrainDataModule
from metamask_plugin.data.datasets.confounded_digits import ConfoundedImages, confounded_digits
from metamask_plugin.data.datasets.digits import digits
from metamask_plugin.data.datasets.folders import FolderImages
from metamask_plugin.data.images import UnreadableImage
from metamask_plugin.data.loaders import evaluation_loader, training_loader
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.registry import DATASETS, load_dataset
from metamask_plugin.data.splits import Dataset, FileImages, ImageSplit, MemoryImages, stratified_subset
from metamask_plugin.data.views import (
    Augmentation,
    EvaluationView,
    KorniaViews,
    TorchvisionViews,
    parse_augmentations,
)

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
    "evaluation_loader",
    "load_dataset",
    "parse_augmentations",
    "region_of",
    "stratified_subset",
    "training_loader",
]
