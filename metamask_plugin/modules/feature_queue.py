"""A queue of past projections: a memory bank of negatives, a support set, a queue of codes."""

import torch
import torch.nn.functional as F
from torch import nn

from metamask_plugin.errors import check

BANK_SIZE = "method_kwargs.task_kwargs.bank_size"


class FeatureQueue(nn.Module):
    """The last ``size`` projections, first in first out, as buffers that a checkpoint keeps.

    Starts with random unit vectors, as MoCo [0] and the memory bank of [1] do. Entries carry no gradient.

    Args:
        size: K, number of entries, >= 0. One of size 0 is empty and stays so.
        dim: P.
        name: the setting that ``size`` came from, for messages.
        negatives: whether the loss pushes the batch's images away from all entries.

    Attributes:
        entries: shape (K, P), unit length; in no particular order.

    [0] He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020.
    [1] Wu et al., *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*, CVPR 2018.
    """

    entries: torch.Tensor
    position: torch.Tensor

    def __init__(self, size: int, dim: int, name: str = BANK_SIZE, negatives: bool = False):
        super().__init__()
        check(isinstance(size, int) and size >= 0, name, "an integer >= 0", size)
        self.name, self.negatives = name, negatives
        self.register_buffer("entries", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.long))

    def __len__(self) -> int:
        return len(self.entries)

    @torch.no_grad()
    def push(self, projections: torch.Tensor) -> None:
        """Replaces the oldest entries by these projections, (N, P), normalised; of more than K the last K."""
        if len(self) == 0:
            return
        newest = F.normalize(projections.detach().to(self.entries.dtype), dim=1)[-len(self) :]
        slots = (self.position + torch.arange(len(newest), device=newest.device)) % len(self)
        self.entries[slots] = newest
        self.position.copy_((self.position + len(newest)) % len(self))
