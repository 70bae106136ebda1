"""What the data loaders iterate over: whole batches from memory or single images, in a seeded order."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, DistributedSampler, RandomSampler

from metamask_plugin.data.loader import ShieldedLoader
from metamask_plugin.data.splits import ImageSplit, MemoryImages
from metamask_plugin.data.views import EvaluationView


class RawBatch(NamedTuple):
    """A training batch before its views are made.

    Attributes:
        indexes: shape (B,).
        images: uint8, shape (B, 3, H, W).
        targets: shape (B,).
    """

    indexes: Tensor
    images: Tensor
    targets: Tensor


def epoch_seed(seed: int, epoch: int) -> int:
    """A generator's seed that differs between epochs and between runs."""
    # The factor keeps (seed, epoch + 1) and (seed + 1, epoch) apart; 2**63 is the generator's limit.
    return (seed * 1_000_003 + epoch) % 2**63


class EpochShuffle(RandomSampler):
    """A permutation that depends on the seed and the epoch only, so that a resumed run sees the same order.

    A ``RandomSampler`` so that Lightning puts its shuffling ``DistributedSampler`` in its place under several
    processes; it is Lightning, too, that calls :meth:`set_epoch`.

    Attributes:
        worker_seeds: give this to the ``DataLoader`` as its ``generator``: the seed of its workers, too, then
            depends on seed and epoch only, and is not drawn from the global generator.
    """

    def __init__(self, data_source: Dataset, seed: int) -> None:
        super().__init__(data_source)
        self.seed = seed
        self.worker_seeds = torch.Generator()
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self._epoch_seed = epoch_seed(self.seed, epoch)
        self.worker_seeds.manual_seed(self._epoch_seed)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._epoch_seed)
        yield from torch.randperm(len(self), generator=generator).tolist()


class EpochPosition:
    """How far a run has come in an epoch, between two of its batches.

    Attributes:
        done: batches of the epoch that an interrupted run has trained on; the next pass leaves them out.
        before_batch: called before a batch is drawn, when nothing of the last one is left to do: the place
            to save a run in the middle of an epoch.
        waiting_for: the batch that the run waits for, counted over all passes; None while it has one.
    """

    def __init__(self) -> None:
        self.done = 0
        self.before_batch: Callable[[], None] = lambda: None
        self.waiting_for: int | None = None
        self._asked = 0

    def rest(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches of an epoch that are still to be trained on.

        Those before are drawn and dropped, so that workers and readers are where they were.
        """
        done, self.done = self.done, 0
        for _ in range(done):
            self._next(batches)
        while True:
            self.before_batch()
            try:
                batch = self._next(batches)
            except StopIteration:
                return
            yield batch

    def _next(self, batches: Iterator[Any]) -> Any:
        self._asked += 1
        self.waiting_for = self._asked
        try:
            return next(batches)
        finally:
            self.waiting_for = None


class LazyLoader(ShieldedLoader):
    """Starts its workers when the first batch is asked for, and begins where the epoch's position says.

    Lightning makes an iterator before it reads a checkpoint and sets the epoch; workers that start by then
    fetch the first images of another epoch.

    Args:
        position: where in its epoch the run is.
        *args: of ``DataLoader``.
        **kwargs: of ``DataLoader``.
    """

    def __init__(self, *args: Any, position: EpochPosition, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.position = position  # public, and of its parameter's name: Lightning makes such a loader anew

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.sampler, DistributedSampler):  # Lightning's, which does not seed workers by epoch
            self.generator.manual_seed(epoch_seed(self.sampler.seed, self.sampler.epoch))
        yield from self.position.rest(super().__iter__())


class MemoryBatches(Dataset):
    """Fetches a batch in one index operation: ``DataLoader`` calls ``__getitems__`` with the batch's indices.

    An ordinary batch sampler stays in place that way, which Lightning knows how to distribute. Use with
    ``collate_fn=whole``.

    Args:
        split: where the images lie.
        finish: makes the batch from indexes, images (B, 3, H, W) and labels, shape (B,) each.
    """

    def __init__(self, split: MemoryImages, finish: Callable[[Tensor, Tensor, Tensor], Any]) -> None:
        self.split = split
        self.finish = finish

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        indexes = torch.as_tensor(indices, dtype=torch.long)
        return self.finish(indexes, self.split.batch(indexes), self.split.labels[indexes])


def whole(batch: Any) -> Any:
    """The collate function for data sets that fetch whole batches."""
    return batch


class IndexedViews(Dataset):
    """Single images for workers: (index, views, label)."""

    def __init__(self, split: ImageSplit, views: Callable[[Any], list[Tensor]]) -> None:
        self.split = split
        self.views = views

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, list[Tensor], Tensor]:
        return index, self.views(self.split.image(index)), self.split.labels[index]


class EvaluationImages(Dataset):
    """Single images for workers: (evaluation view, label)."""

    def __init__(self, split: ImageSplit, view: EvaluationView) -> None:
        self.split = split
        self.view = view

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.view(self.split.image(index)), self.split.labels[index]
