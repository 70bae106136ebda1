"""One bi-level problem over the global batch of several ranks.

No communication is differentiated. Ranks exchange *features*, which are small, and each evaluates heads and
losses on the global batch; what belongs to the encoder is done on a rank's own images, and its gradients are
summed. So negatives, cross-correlations and the heads' BatchNorm see the global batch, and every rank
computes the same gradient with respect to w.
"""

from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """The processes of ``torch.distributed``'s default group, with batches of one size.

    Args:
        dim: the axis along which the samples lie. The global batch has them in order of rank.
    """

    def __init__(self, dim: int = 0):
        self.dim = dim

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """The global batch from each rank's own samples, without a graph."""
        own = own.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=self.dim)

    def local_slice(self, batch: torch.Tensor) -> torch.Tensor:
        """This rank's samples of a global batch."""
        return batch.chunk(dist.get_world_size(), dim=self.dim)[dist.get_rank()]

    def sum(self, params: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Sums each tensor over ranks, by one all-reduce of all tensors laid end to end."""
        if not params:
            return params
        flat = torch.cat([param.reshape(-1) for param in params.values()])
        dist.all_reduce(flat)
        pieces = flat.split([param.numel() for param in params.values()])
        return {name: piece.view_as(param) for (name, param), piece in zip(params.items(), pieces)}


def current_ranks(dim: int = 0) -> Ranks | None:
    """The ranks that train together; None for a process on its own.

    Args:
        dim: the axis along which the samples lie.
    """
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Ranks(dim) if several else None


class _GlobalBatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
        ctx.ranks = ranks
        return ranks.gather(own)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.ranks.local_slice(grads[0]) * dist.get_world_size(), None


def global_batch(own: torch.Tensor, ranks: Ranks) -> torch.Tensor:
    """The global batch, differentiable once, for a loss that every rank evaluates on all of it.

    Each rank's loss is then the global one. Behind the cut a rank has the whole gradient, before it only that
    of its own samples; averaging over ranks, as DistributedDataParallel does, is right behind and divides too
    often before. So the gradient of the own samples is multiplied by the number of ranks.

    Args:
        own: this rank's samples.
        ranks: who else has some.
    """
    return _GlobalBatch.apply(own, ranks)
