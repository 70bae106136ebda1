"""Training images that live on the device, as uint8: of a batch only its indexes travel."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from metamask_plugin.data.batches import RawBatch
from metamask_plugin.data.splits import MemoryImages

# The rest is the training's: activations at their peak, and whatever the allocator keeps to itself.
SHARE_OF_FREE_MEMORY = 1 / 3


class IndexBatch(NamedTuple):
    """A training batch whose images are on the device already.

    Attributes:
        indexes: shape (B,).
    """

    indexes: Tensor


class IndexBatches(Dataset):
    """The batches of :class:`~metamask_plugin.data.batches.MemoryBatches`, by their indexes alone.

    Use with ``collate_fn=whole``.

    Args:
        count: images that there are.
    """

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitems__(self, indices: Sequence[int]) -> IndexBatch:
        return IndexBatch(torch.as_tensor(indices, dtype=torch.long))


class ResidentImages:
    """A whole split on the device of those who ask for batches of it; under several processes on each one's.

    Args:
        split: where the images lie until the first batch is asked for.
    """

    def __init__(self, split: MemoryImages) -> None:
        self.split = split
        self._images: Tensor | None = None
        self._labels: Tensor | None = None

    def batch(self, indexes: Tensor) -> RawBatch:
        """The images and labels of ``indexes``, shape (B,), on the device of ``indexes``.

        The first call copies the split there, in one transfer; on the CPU there is nothing to copy.
        """
        if self._images is None or self._images.device != indexes.device:
            self.release()  # not twice on one device, or on two
            self._images = self.split.images.to(indexes.device)
            self._labels = self.split.labels.to(indexes.device)
        return RawBatch(indexes, self._images[indexes], self._labels[indexes])

    def release(self) -> None:
        """Gives the device's memory back."""
        self._images = self._labels = None


def fits(split: MemoryImages, device: torch.device) -> bool:
    """Whether ``split`` is small against the free memory of ``device``; never on a CPU, where it lies."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return split.images.nbytes < SHARE_OF_FREE_MEMORY * free
