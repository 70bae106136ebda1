"""Training and evaluation batches as plain ``DataLoader`` objects, in an order that seed and epoch decide."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler

from metamask_plugin.data.splits import ImageSplit, MemoryImages
from metamask_plugin.data.views import EvaluationView, KorniaViews, TorchvisionViews
from metamask_plugin.data.workers import ShieldedLoader, check_worker_sockets
from metamask_plugin.errors import check, choose

PIPELINES = ("kornia", "torchvision")
# solo-learn's defaults
SEED = 5
NUM_WORKERS = 4
# The rest is the training's: activations at their peak, and whatever the allocator keeps to itself.
SHARE_OF_FREE_MEMORY = 1 / 3


class RawBatch(NamedTuple):
    """A training batch before its views are drawn.

    Attributes:
        indexes: shape (B,).
        images: uint8, shape (B, 3, H, W).
        targets: shape (B,).
    """

    indexes: Tensor
    images: Tensor
    targets: Tensor


def evaluation_loader(
    dataset: ImageSplit, transform: EvaluationView, batch_size: int = 256, num_workers: int = 0
) -> DataLoader:
    """All images of a split in their order, as batches ``[images, labels]``.

    The images are float32 and normalised, shape (B, 3, s, s). Nothing is drawn from torch's global generator.

    Args:
        dataset: the images.
        transform: the evaluation view.
        batch_size: B.
        num_workers: processes that decode image files; images in memory need none.

    Example:
        >>> from metamask_plugin.data import EvaluationView, digits
        >>> train, test = digits(size=16)
        >>> view = EvaluationView(16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
        >>> images, labels = next(iter(evaluation_loader(test, view, batch_size=32)))
        >>> images.shape, labels.shape
        (torch.Size([32, 3, 16, 16]), torch.Size([32]))
    """
    # Without a generator of its own a loader draws its workers' seed from the global one.
    options = {"generator": torch.Generator(), "pin_memory": torch.cuda.is_available()}
    if not isinstance(dataset, MemoryImages):
        images = SingleImages(dataset, transform)
        return ShieldedLoader(images, batch_size, num_workers=num_workers, **options)

    def fetch(indexes: Tensor) -> list[Tensor]:
        return [transform(dataset.batch(indexes)), dataset.labels[indexes]]

    return ShieldedLoader(WholeBatches(dataset, fetch), batch_size, collate_fn=whole, **options)


def training_loader(
    dataset: ImageSplit,
    transform: "TorchvisionViews | KorniaViews | BatchedViews",
    batch_size: int,
    seed: int = SEED,
    num_workers: int = 0,
    device: torch.device | str | None = None,
    on_device: bool | None = None,
    position: "EpochPosition | None" = None,
) -> "TrainingLoader":
    """Batches ``[indexes (B,), [view (B, 3, s, s), ...], labels (B,)]``, shuffled by seed and epoch.

    Call ``loader.sampler.set_epoch(epoch)`` before each epoch. An incomplete last batch is dropped.

    Args:
        dataset: the images.
        transform: :class:`TorchvisionViews` draw views image by image on workers; :class:`KorniaViews`, for
            images in memory, a batch at a time on ``device``.
        batch_size: B.
        seed: of the order.
        num_workers: processes that decode and draw, for ``TorchvisionViews``.
        device: where the batches are moved; None yields them as they are on the host, for a framework that
            moves them: those of ``KorniaViews`` are then to be finished by :meth:`BatchedViews.draw`.
        on_device: whether ``KorniaViews`` keep the whole split on ``device``, see :class:`BatchedViews`.
        position: where in its epoch the run is; the beginning by default.

    Example:
        >>> from metamask_plugin.data import KorniaViews, digits
        >>> train, test = digits(size=16)
        >>> views = KorniaViews([{"crop_size": 16, "num_crops": 2}], mean=[0.5] * 3, std=[0.5] * 3)
        >>> loader = training_loader(train, views, batch_size=64, device="cpu")
        >>> loader.sampler.set_epoch(0)
        >>> indexes, (x1, x2), labels = next(iter(loader))
        >>> x1.shape
        torch.Size([64, 3, 16, 16])
    """
    if isinstance(transform, KorniaViews):
        transform = BatchedViews(dataset, transform, device, on_device)
    draw = None
    if isinstance(transform, BatchedViews):
        # Indexing uint8 rows takes a fraction of a millisecond: a worker would only add the transport.
        images = WholeBatches(dataset, transform.fetch)
        options, draw = {"collate_fn": whole}, transform.draw
    else:
        # Not persistent: workers that start anew with each epoch are seeded by it, and a resumed run's alike.
        # Torch's default of two batches ahead a worker stays: four or eight made no difference with a step
        # of eight times the length every eighth time.
        images, options = SingleImages(dataset, transform, indexed=True), {"num_workers": num_workers}

    def finish(batch: Any) -> list:
        batch = moved(batch, device)
        return batch if draw is None else draw(batch)

    order = EpochShuffle(images, seed)
    return TrainingLoader(
        images,
        batch_size,
        position=position or EpochPosition(),
        finish=None if device is None else finish,
        sampler=order,
        generator=order.worker_seeds,
        drop_last=True,
        pin_memory=torch.cuda.is_available(),
        **options,
    )


class BatchedViews:
    """Views of whole batches in two halves: images are fetched on the host, views drawn where the batch lies.

    Args:
        split: the images, in memory as uint8.
        views: draws the views of a batch.
        device: where they are drawn.
        on_device: True keeps the whole split there, from the first batch on, so that of a batch only its
            indexes travel; False leaves it on the host; None decides by :func:`fits`.
    """

    def __init__(
        self,
        split: MemoryImages,
        views: KorniaViews,
        device: torch.device | str | None = None,
        on_device: bool | None = None,
    ) -> None:
        self.split, self.views = split, views
        self.on_device = fits(split, torch.device(device or "cpu")) if on_device is None else on_device
        self._images: Tensor | None = None
        self._labels: Tensor | None = None

    def fetch(self, indexes: Tensor) -> RawBatch | Tensor:
        """On the host: indexes, images and labels, or the indexes alone, shape (B,)."""
        if self.on_device:
            return indexes
        return RawBatch(indexes, self.split.batch(indexes), self.split.labels[indexes])

    def draw(self, batch: RawBatch | Tensor) -> list:
        """On the device: ``[indexes, views, labels]``."""
        if isinstance(batch, Tensor):
            batch = self._resident(batch)
        return [batch.indexes, self.views(batch.images), batch.targets]

    def _resident(self, indexes: Tensor) -> RawBatch:
        """The first call copies the split, in one transfer; on the CPU there is nothing to copy."""
        if self._images is None or self._images.device != indexes.device:
            self.release()  # not twice on one device, or on two
            self._images = self.split.images.to(indexes.device)
            self._labels = self.split.labels.to(indexes.device)
        return RawBatch(indexes, self._images[indexes], self._labels[indexes])

    def release(self) -> None:
        """Gives the device's memory back."""
        self._images = self._labels = None


def chosen_pipeline(data: Mapping[str, Any], split: ImageSplit) -> str:
    """``data.pipeline``: by default ``kornia`` for images in memory, ``torchvision`` for files."""
    default = PIPELINES[0 if isinstance(split, MemoryImages) else 1]
    return choose("data.pipeline", data.get("pipeline") or default, PIPELINES)


def checked_workers(data: Mapping[str, Any], pipeline: str) -> int:
    """``data.num_workers``, 4 by default; raises where workers cannot send batches."""
    workers = data.get("num_workers")
    workers = NUM_WORKERS if workers is None else workers
    whole_number = isinstance(workers, int) and workers >= 0
    check(whole_number, "data.num_workers", "a whole number of at least 0", workers)
    if workers and pipeline != "kornia":
        check_worker_sockets()
    return workers


def fits(split: MemoryImages, device: torch.device) -> bool:
    """Whether ``split`` is small against the free memory of ``device``; never on a CPU, where it lies."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.images.nbytes < SHARE_OF_FREE_MEMORY * free


def moved(batch: Any, device: torch.device | str) -> Any:
    """A batch, its tensors moved to ``device``."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    parts = [moved(part, device) for part in batch]
    return RawBatch(*parts) if isinstance(batch, RawBatch) else parts


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


class TrainingLoader(ShieldedLoader):
    """Starts its workers when the first batch is asked for, and begins where the epoch's position says.

    Lightning makes an iterator before it reads a checkpoint and sets the epoch; workers that start by then
    fetch the first images of another epoch.

    Args:
        position: where in its epoch the run is.
        finish: what is done with a batch before it is given; nothing by default.
        *args: of ``DataLoader``.
        **kwargs: of ``DataLoader``.
    """

    def __init__(
        self,
        *args: Any,
        position: EpochPosition,
        finish: Callable[[Any], Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        # public, and of their parameters' names: Lightning makes such a loader anew
        self.position, self.finish = position, finish

    def __iter__(self) -> Iterator[Any]:
        if isinstance(self.sampler, DistributedSampler):  # Lightning's, which does not seed workers by epoch
            self.generator.manual_seed(epoch_seed(self.sampler.seed, self.sampler.epoch))
        batches = self.position.rest(super().__iter__())
        yield from batches if self.finish is None else map(self.finish, batches)


class WholeBatches(Dataset):
    """Fetches a batch in one index operation: ``DataLoader`` calls ``__getitems__`` with the batch's indices.

    An ordinary batch sampler stays in place that way, which Lightning knows how to distribute. Use with
    ``collate_fn=whole``.

    Args:
        split: the images.
        fetch: makes the batch of indexes of shape (B,).
    """

    def __init__(self, split: MemoryImages, fetch: Callable[[Tensor], Any]) -> None:
        self.split = split
        self.fetch = fetch

    def __len__(self) -> int:
        return len(self.split)

    def __getitems__(self, indices: Sequence[int]) -> Any:
        return self.fetch(torch.as_tensor(indices, dtype=torch.long))


def whole(batch: Any) -> Any:
    """The collate function for data sets that fetch whole batches."""
    return batch


class SingleImages(Dataset):
    """Single images for workers: ``(view, label)``, or ``(index, view, label)``.

    Args:
        split: the images.
        view: makes one view, or a list of them.
        indexed: whether the index comes with it.
    """

    def __init__(self, split: ImageSplit, view: Callable[[Any], Any], indexed: bool = False) -> None:
        self.split, self.view, self.indexed = split, view, indexed

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple:
        item = self.view(self.split.image(index)), self.split.labels[index]
        return (index, *item) if self.indexed else item
