"""Training batches from NVIDIA DALI, for ``data.format: dali``."""

import os
from collections.abc import Iterator, Sequence
from importlib import import_module

import numpy as np
import torch
from torch import Tensor

from metamask_plugin.data.augmentations import Augmentation
from metamask_plugin.data.loaders import EpochPosition, EpochShuffle
from metamask_plugin.data.splits import FileImages, ImageSplit
from metamask_plugin.errors import UserError, check, choose

DEVICES = ("cpu", "gpu")
INSTALL = "pip install nvidia-dali-cuda130 (CUDA 12: nvidia-dali-cuda120), or set data.format=image_folder"


class DaliBatches:
    """Iterates over ``[indexes (B,), [view (B, 3, s, s), ...], targets (B,)]``; whole batches only.

    Order and augmentations are functions of seed and epoch alone, so that a resumed run sees what the
    uninterrupted one would have seen: an epoch has a pipeline of its own, seeded like the workers of a
    ``DataLoader``. A second pass through the same epoch gives the same images in the same order, augmented
    anew.

    Args:
        split: image files.
        entries: how views are made, see :func:`~metamask_plugin.data.augmentations.parse_augmentations`.
        mean: per channel, for images in [0, 1].
        std: per channel.
        batch_size: B, of one process.
        seed: the run's.
        device: ``cpu`` or ``gpu``; the views of ``gpu`` lie on the current CUDA device.
        threads: DALI's, at least 1.
        rank: this process among ``processes``; each takes its share of the one order.
        processes: how many train together.
        position: where in its epoch the run is; the beginning by default.

    Attributes:
        sampler: the epoch's order. Lightning calls its ``set_epoch``, as with a ``DataLoader``.

    Raises:
        UserError: DALI is missing, ``split`` is none of whole image files, an unknown or missing device, or
            a share of less than one batch; while iterating, a file that cannot be decoded.
    """

    def __init__(
        self,
        split: ImageSplit,
        entries: Sequence[Augmentation],
        mean: Sequence[float],
        std: Sequence[float],
        batch_size: int,
        seed: int,
        device: str = "cpu",
        threads: int = 1,
        rank: int = 0,
        processes: int = 1,
        position: EpochPosition | None = None,
    ) -> None:
        require_dali(split, device)
        check(
            batch_size <= len(split) // processes,
            "optimizer.batch_size",
            f"at most {len(split) // processes}, a process's share of the training images",
            batch_size,
            "lower optimizer.batch_size",
        )
        self.split, self.entries, self.mean, self.std = split, entries, mean, std
        self.batch_size, self.device, self.threads = batch_size, device, threads
        self.rank, self.processes = rank, processes
        self.sampler = EpochShuffle(split, seed)
        self.position = position or EpochPosition()

    def __len__(self) -> int:
        return len(self.split) // self.processes // self.batch_size

    def __iter__(self) -> Iterator[list]:
        # Nothing happens before the first batch is asked for: Lightning makes an iterator before it sets the
        # epoch, and another one after.
        yield from self.position.rest(self._batches())

    def _batches(self) -> Iterator[list]:
        share = list(self.sampler)[self.rank :: self.processes]
        starts = range(0, len(self) * self.batch_size, self.batch_size)
        batches = [share[start : start + self.batch_size] for start in starts]
        outputs = self._outputs(batches)
        for batch in batches:
            try:
                *views, indexes = next(outputs)
            # DALI's own errors are of several lines, and not all of them name the file.
            except RuntimeError as error:
                raise self._undecodable(batch, error) from None
            yield [indexes, views, self.split.labels[indexes]]

    def _outputs(self, batches: Sequence[Sequence[int]]) -> Iterator[list[Tensor]]:
        """What the pipeline gives, batch by batch."""
        from nvidia.dali.plugin.pytorch import DALIGenericIterator

        from metamask_plugin.data.dali_views import dali_views

        # As a DataLoader draws the seed of its workers; each process has another.
        seeds = torch.empty(self.processes, dtype=torch.int64).random_(generator=self.sampler.worker_seeds)
        pipeline = dali_views(
            ((self._files(batch), np.array(batch, dtype=np.int64)) for batch in batches),
            self.entries,
            self.mean,
            self.std,
            self.device,
            batch_size=self.batch_size,
            num_threads=self.threads,
            device_id=torch.cuda.current_device() if self.device == "gpu" else None,
            seed=int(seeds[self.rank]),
        )
        names = [f"view{i}" for i in range(sum(entry.num_crops for entry in self.entries))] + ["indexes"]
        for (outputs,) in DALIGenericIterator(pipeline, names, prepare_first_batch=False):
            yield [outputs[name] for name in names]

    def _files(self, batch: Sequence[int]) -> list[np.ndarray]:
        return [np.frombuffer(os.fsencode(self.split.paths[index]), dtype=np.uint8) for index in batch]

    def _undecodable(self, batch: Sequence[int], error: RuntimeError) -> UserError:
        """One line for a file of the batch that Pillow cannot read either, else with DALI's own reason."""
        for index in batch:
            try:
                self.split.image(index)
            except UserError as unreadable:
                return unreadable
        # DALI's reason stands between a traceback of the pipeline's definition and one of its own
        reason = " ".join(str(error).split()).rpartition("encountered: ")[2].partition(" C++ context")[0]
        return UserError(
            f"data.format must be image_folder where DALI fails on a batch, got 'dali': {reason}"
        )


def require_dali(split: ImageSplit, device: str) -> None:
    """Raises a :class:`UserError` unless DALI can make the training batches of ``split`` on ``device``."""
    choose("dali.device", device, DEVICES)
    check(
        isinstance(split, FileImages),
        "data.format",
        "image_folder for a data set that lies in memory",
        "dali",
        "DALI decodes image files: imagenet, imagenet100, tiny_imagenet, coco, custom",
    )
    check(
        type(split).image is FileImages.image,
        "data.region",
        "full with data.format=dali",
        "a part of the images",
        "set data.format=image_folder",
    )
    check(split.reading.bits == 16, "data.bits", "null with data.format=dali", split.reading.bits,
          "set data.format=image_folder")  # fmt: skip
    try:
        import_module("nvidia.dali.plugin.pytorch")
    except ImportError as error:
        raise UserError(
            f"data.format must be image_folder where NVIDIA DALI cannot be imported ({error}), got 'dali'; "
            f"{INSTALL}"
        ) from None
    check(
        device == "cpu" or torch.cuda.is_available(),
        "dali.device",
        "cpu on a machine without CUDA",
        device,
        "set dali.device=cpu",
    )
