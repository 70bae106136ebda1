"""The batches of a pretraining run, in the shape solo-learn's methods expect."""

from collections.abc import Iterable
from dataclasses import replace
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from metamask_plugin.data.loaders import (
    SEED,
    BatchedViews,
    EpochPosition,
    RawBatch,
    checked_workers,
    chosen_pipeline,
    evaluation_loader,
    training_loader,
)
from metamask_plugin.data.regions import region_of
from metamask_plugin.data.registry import Dataset, evaluation_resize
from metamask_plugin.data.remarks import tell_unused_statistics
from metamask_plugin.data.splits import ImageSplit
from metamask_plugin.data.verify import prepared
from metamask_plugin.data.views import (
    Augmentation,
    EvaluationView,
    KorniaViews,
    TorchvisionViews,
    parse_augmentations,
)
from metamask_plugin.errors import UserError, check, choose

FORMATS = ("image_folder", "dali")


class PretrainDataModule(LightningDataModule):
    """Training batches ``[indexes (B,), [view (B, 3, s, s), ...], targets (B,)]``, test ``[X, targets]``.

    ``data.pipeline`` says where views are made, see :func:`~metamask_plugin.data.loaders.training_loader`:
    ``torchvision``, image by image on ``data.num_workers`` workers (the default for image files), or
    ``kornia``, a batch at a time on the device, in :meth:`on_after_batch_transfer` (the default for images in
    memory). For ``kornia`` image files are decoded into memory first, resized to the largest crop size, or to
    ``data.evaluation_resize`` where that is larger; ``data.on_device`` says whether that memory is the
    device's (by default where three times as much is free there). The batches are the same.

    With ``data.format: dali``, solo-learn's key, NVIDIA DALI reads and decodes the training images and makes
    their views, on ``dali.device`` (``gpu`` or ``cpu``; default ``gpu`` where the run uses one) with
    ``data.num_workers`` threads, see :func:`~metamask_plugin.data.dali.dali_views`; evaluation stays with
    torchvision.

    Args:
        dataset: see :func:`load_dataset`.
        cfg: the run's configuration; read are ``data`` (``format``, ``pipeline``, ``on_device``,
            ``num_workers``, ``evaluation_resize``, ``mean``, ``std``, and what
            :func:`~metamask_plugin.data.verify.prepared` reads), ``dali.device``, ``augmentations``,
            ``optimizer.batch_size``, ``limit_train_batches`` and ``seed``.
        processes: how many train together; each has its share of the training images.

    Attributes:
        dataset: the data set as it is used: in memory for ``kornia``; for ``custom`` with the mean and std of
            ``augmentations[0]``, where they are given.
        full: the data set as loaded, full images, whatever ``data.region`` says, and files not decoded; mean
            and std as in ``dataset``.
        pipeline: ``kornia``, ``torchvision`` or ``dali``.
        view: the evaluation view, of the first augmentation's crop size.
        position: where in its epoch the training is.

    Raises:
        UserError: a setting is unknown, the batch is larger than a process's share of the training split, an
            epoch has no batch, workers cannot send batches, or an image file cannot be read and is not to be
            skipped. What DALI cannot do is found in :meth:`setup`: an evaluator needs no DALI.
    """

    def __init__(self, dataset: Dataset, cfg: DictConfig, processes: int = 1) -> None:
        super().__init__()
        entries = parse_augmentations(cfg.augmentations)
        self.pipeline = chosen_pipeline(cfg.data, dataset.train)
        if choose("data.format", cfg.data.get("format") or FORMATS[0], FORMATS) == "dali":
            self.pipeline = "dali"
        limit = cfg.get("limit_train_batches")
        self.batch_size = cfg.optimizer.get("batch_size")
        self.num_workers = checked_workers(cfg.data, self.pipeline)
        self.on_device = cfg.data.get("on_device")
        check(
            not self.on_device or self.pipeline == "kornia",
            "data.on_device",
            f"False or left out with the pipeline {self.pipeline}",
            self.on_device,
            "its images are files, or views made by workers; set data.pipeline=kornia",
        )
        seed = cfg.get("seed")
        self.seed = SEED if seed is None else seed
        if dataset.name == "custom":
            first = cfg.augmentations[0]
            given = {key: tuple(first[key]) for key in ("mean", "std") if first.get(key) is not None}
            dataset = replace(dataset, **given)
        if not isinstance(cfg.augmentations[0], Augmentation):
            tell_unused_statistics(dataset.name, dataset.mean, dataset.std, cfg.augmentations, cfg.data)
        crop_size = entries[0].crop_size
        resize = evaluation_resize(dataset.name, crop_size, cfg.data.get("evaluation_resize"))
        self.view = EvaluationView(crop_size, dataset.mean, dataset.std, resize)
        largest = max(resize, *(entry.crop_size for entry in entries))
        self.full, dataset = prepared(dataset, cfg.data, largest, self.pipeline == "kornia")
        _check_batches(self.batch_size, len(dataset.train), processes, self.pipeline, limit)
        self.dataset = dataset
        draw = KorniaViews if self.pipeline == "kornia" else TorchvisionViews
        self.views = draw(entries, dataset.mean, dataset.std)
        self.position = EpochPosition()
        self._entries = entries
        self._batched: BatchedViews | None = None
        self._dali_device_given = OmegaConf.select(cfg, "dali.device")

    def setup(self, stage: str | None = None) -> None:
        """Before a training: whether DALI can do what is asked of it."""
        if self.pipeline == "dali" and stage in ("fit", None):
            _dali().require_dali(self.dataset.train, self._dali_device())

    def train_dataloader(self) -> Iterable:
        """Shuffled by seed and epoch; an incomplete last batch is dropped."""
        if self.pipeline == "dali":
            return self._dali_batches()
        split, views = self.dataset.train, self.views
        if self.pipeline == "kornia":
            if self._batched is None:  # loaders may be asked for again, images on the device stay
                self._batched = BatchedViews(split, views, self._device(), self.on_device)
            views = self._batched
        return training_loader(
            split, views, self.batch_size, self.seed, self.num_workers, position=self.position
        )

    def val_dataloader(self) -> DataLoader | list:
        """The test split in fixed order; an empty list, Lightning's "no validation", where there is none."""
        return [] if self.dataset.test is None else self.evaluation_loader(self.dataset.test, self.batch_size)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Makes a training batch's views where the batch lies now."""
        if not isinstance(batch, RawBatch | Tensor):
            return batch
        indexes, views, targets = self._batched.draw(batch)
        if self.trainer:  # it converts a batch before this hook, where there are no views yet
            views = self.trainer.precision_plugin.convert_input(views)
        return [indexes, views, targets]

    def teardown(self, stage: str | None = None) -> None:
        """After a training: the evaluation may need the device's memory."""
        if self._batched is not None and stage in ("fit", None):
            self._batched.release()

    def evaluation_loader(self, split: ImageSplit, batch_size: int = 256) -> DataLoader:
        """All images of ``split`` in their order, as ``[X, targets]``."""
        return evaluation_loader(split, self.view, batch_size, self.num_workers)

    def region_loader(
        self, split_name: str, region: str, form: str = "fill", batch_size: int = 256
    ) -> DataLoader:
        """The labelled images of ``full``, seen in one region, as :meth:`evaluation_loader` gives them.

        Args:
            split_name: ``"train"`` or ``"test"``.
            region: see :func:`region_of`; independent of ``data.region``.
            form: see :func:`region_of`.
            batch_size: images in a batch.

        Raises:
            UserError: an unknown split, region or form, a split without boxes, or no test split.
        """
        split = getattr(self.full, choose("split", split_name, ("train", "test")))
        check(
            split is not None,
            f"data set {self.full.name}",
            "one with a test split",
            None,
            "set data.val_path",
        )
        labelled = (split.labels >= 0).nonzero().flatten()
        seen = region_of(split.subset(labelled), region, self.full.mean, form)
        return self.evaluation_loader(seen, batch_size)

    def _dali_batches(self) -> Iterable:
        # Lightning gives each process its share by replacing a DataLoader's sampler; this is no DataLoader.
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return _dali().DaliBatches(
            self.dataset.train,
            self._entries,
            self.dataset.mean,
            self.dataset.std,
            self.batch_size,
            self.seed,
            self._dali_device(),
            max(1, self.num_workers),
            rank,
            processes,
            self.position,
        )

    def _dali_device(self) -> str:
        return self._dali_device_given or ("gpu" if self._device().type == "cuda" else "cpu")

    def _device(self) -> torch.device:
        """Where the training runs; without a trainer, where it would."""
        if self.trainer:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _dali() -> ModuleType:
    """The module that needs DALI."""
    try:
        return import_module("metamask_plugin.data.dali")
    except ImportError as error:
        raise UserError(
            f"data.format must be image_folder where NVIDIA DALI cannot be imported ({error}), got 'dali'; "
            "pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or set data.format=image_folder"
        ) from None


def _check_batches(batch_size: int, images: int, processes: int, pipeline: str, limit: Any) -> None:
    """Raises a UserError unless an epoch of each process has at least one whole batch.

    Args:
        batch_size: images of a process's batch.
        images: of the training split.
        processes: how many share them.
        pipeline: ``dali`` gives each process the same whole number of images; Lightning's sampler repeats
            some, so that none has fewer.
        limit: ``limit_train_batches``, of which a float is a share of the epoch's batches.
    """
    share = images // processes if pipeline == "dali" else -(-images // processes)
    whose = (
        "the number of training images" if processes == 1 else f"the images of one of {processes} processes"
    )
    check(
        batch_size <= share,
        "optimizer.batch_size",
        f"at most {share}, {whose}",
        batch_size,
        "lower optimizer.batch_size or raise data.fraction",
    )
    batches = share // batch_size
    check(
        not isinstance(limit, float) or int(batches * limit) >= 1,
        "limit_train_batches",
        f"a share of at least one of the epoch's {batches} batches",
        limit,
        "set limit_train_batches=1, a number of batches",
    )
