"""The batches of a pretraining run, in the shape solo-learn's methods expect."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningDataModule
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from metamask_plugin.data.augmentations import Augmentation, parse_augmentations
from metamask_plugin.data.dali_batches import DaliBatches, require_dali
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
from metamask_plugin.data.views import EvaluationView, KorniaViews, TorchvisionViews
from metamask_plugin.errors import check, choose

FORMATS = ("image_folder", "dali")


class PretrainDataModule(LightningDataModule):
    """Training batches ``[indexes (B,), [view (B, 3, s, s), ...], targets (B,)]``, test ``[X, targets]``.

    ``data.pipeline`` says where the views are made:

    - ``torchvision``: image by image on ``data.num_workers`` workers.
    - ``kornia``: the images lie in memory as uint8 and a batch's views are made at once, on the device, in
      :meth:`on_after_batch_transfer`. Image files are decoded into memory first, resized to the largest crop
      size, or to ``data.evaluation_resize`` where that is larger. ``data.on_device`` says where that memory
      is: True, on the device, from the first batch on, so that only indexes travel; False, on the host,
      pinned where there is CUDA. The default is the device if that is a GPU whose free memory is three times
      what the images need. The batches are the same.

    The default is ``kornia`` if the training split is in memory, else ``torchvision``.

    With ``data.format: dali``, solo-learn's key, NVIDIA DALI reads and decodes the training images and makes
    their views, on ``dali.device`` (``gpu`` or ``cpu``; default ``gpu`` where the run uses one) with
    ``data.num_workers`` threads, see :func:`~metamask_plugin.data.dali_views.dali_views`; evaluation stays
    with torchvision.

    ``data.evaluation_resize`` says what the shorter side is resized to before the evaluation's centre crop,
    see :func:`~metamask_plugin.data.registry.evaluation_resize`.

    ``data.region`` (``full``, ``foreground`` or ``background``; default ``full``) and ``data.region_form``
    (``fill`` or ``zoom``; default ``fill``) say what of the training and test images is to be seen, see
    :func:`region_of`.

    Args:
        dataset: see :func:`load_dataset`.
        cfg: the run's configuration; read are ``data.format``, ``data.pipeline``, ``data.on_device``,
            ``data.num_workers``, ``data.region``, ``data.region_form``, ``data.verify``,
            ``data.invalid_images`` (see :mod:`~metamask_plugin.data.verify`), ``data.evaluation_resize``,
            ``data.mean``, ``data.std``, ``dali.device``, ``augmentations``, ``optimizer.batch_size``,
            ``limit_train_batches`` and ``seed``.
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
        UserError: a setting is unknown or out of range, the batch is larger than a process's share of the
            training split, an epoch has no batch, workers cannot send batches, or an image file cannot be
            read and is not to be skipped.
            What DALI cannot do is found in :meth:`setup`: an evaluator needs no DALI.
    """

    def __init__(self, dataset: Dataset, cfg: DictConfig, processes: int = 1) -> None:
        super().__init__()
        entries = parse_augmentations(cfg.augmentations)
        self.pipeline = chosen_pipeline(cfg.data, dataset.train)
        if choose("data.format", cfg.data.get("format") or FORMATS[0], FORMATS) == "dali":
            self.pipeline = "dali"
        limit = cfg.get("limit_train_batches")
        self.batch_size = cfg.optimizer.get("batch_size")
        _check_batches(self.batch_size, len(dataset.train), processes, self.pipeline, limit)
        self.num_workers = checked_workers(cfg.data, self.pipeline)
        self.on_device = _checked_on_device(cfg.data.get("on_device"), self.pipeline)
        seed = cfg.get("seed")
        self.seed = SEED if seed is None else seed
        if dataset.name == "custom":
            dataset = _with_configured_mean_std(dataset, cfg.augmentations[0])
        if not isinstance(cfg.augmentations[0], Augmentation):
            tell_unused_statistics(dataset.name, dataset.mean, dataset.std, cfg.augmentations, cfg.data)
        crop_size = entries[0].crop_size
        resize = evaluation_resize(dataset.name, crop_size, cfg.data.get("evaluation_resize"))
        self.view = EvaluationView(crop_size, dataset.mean, dataset.std, resize)
        largest = max(resize, *(entry.crop_size for entry in entries))
        self.full, dataset = prepared(dataset, cfg.data, largest, self.pipeline == "kornia")
        # without those that were skipped
        _check_batches(self.batch_size, len(dataset.train), processes, self.pipeline, limit)
        self.dataset = dataset
        draw = KorniaViews if self.pipeline == "kornia" else TorchvisionViews
        self.views = draw(entries, dataset.mean, dataset.std)
        self.position = EpochPosition()
        self._entries = entries
        self._batched: BatchedViews | None = None
        self._wanted = {key: OmegaConf.select(cfg, key) for key in ("data.pipeline", "dali.device")}

    def setup(self, stage: str | None = None) -> None:
        """Before a training: whether DALI can do what is asked of it."""
        if self.pipeline == "dali" and stage in ("fit", None):
            pipeline = self._wanted["data.pipeline"]
            check(pipeline is None, "data.pipeline", "left out with data.format=dali", pipeline)
            require_dali(self.dataset.train, self._dali_device())

    def train_dataloader(self) -> DataLoader | DaliBatches:
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

    def _dali_batches(self) -> DaliBatches:
        # Lightning gives each process its share by replacing a DataLoader's sampler; this is no DataLoader.
        rank, processes = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return DaliBatches(
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
        if self._wanted["dali.device"] is not None:
            return self._wanted["dali.device"]
        return "gpu" if self._device().type == "cuda" else "cpu"

    def _device(self) -> torch.device:
        """Where the training runs; without a trainer, where it would."""
        if self.trainer:
            return self.trainer.strategy.root_device
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _check_batches(batch_size: Any, images: int, processes: int, pipeline: str, limit: Any) -> None:
    """Raises a UserError unless an epoch of each process has at least one whole batch.

    Args:
        batch_size: images of a process's batch.
        images: of the training split.
        processes: how many share them.
        pipeline: ``dali`` gives each process the same whole number of images; Lightning's sampler repeats
            some, so that none has fewer.
        limit: ``limit_train_batches``, of which a float is a share of the epoch's batches.
    """
    whole_number = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    check(
        whole_number and batch_size >= 1, "optimizer.batch_size", "a whole number of at least 1", batch_size
    )
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


def _checked_on_device(on_device: Any, pipeline: str) -> bool | None:
    check(
        on_device is None or isinstance(on_device, bool),
        "data.on_device",
        "True, False, or null where the free memory is to decide",
        on_device,
    )
    check(
        not on_device or pipeline == "kornia",
        "data.on_device",
        f"False or left out with the pipeline {pipeline}",
        on_device,
        "its images are files, or views made by workers; set data.pipeline=kornia",
    )
    return on_device


def _with_configured_mean_std(dataset: Dataset, node: DictConfig) -> Dataset:
    configured = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)
    given = {key: tuple(configured[key]) for key in ("mean", "std") if configured.get(key) is not None}
    for key, value in given.items():
        check(len(value) == 3, f"augmentations[0].{key}", "three numbers, one a channel", list(value))
    return replace(dataset, **given)
