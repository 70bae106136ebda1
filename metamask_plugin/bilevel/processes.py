"""One bi-level problem over the joint batch of several processes.

No communication is differentiated. Processes exchange *features*, which are small, and each evaluates heads
and losses on the joint batch; what belongs to the encoder is done on a process's own images, and its
gradients are summed. So negatives, cross-correlations and the heads' BatchNorm see the joint batch, and
every process arrives at the same gradient with respect to w.
"""

from typing import Protocol

import torch
import torch.distributed as dist

from metamask_plugin.bilevel.params import Params


class Processes(Protocol):
    """How the processes that share a batch exchange what belongs to it."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        """The joint batch from each process's own part, without a graph."""

    def part(self, joint: torch.Tensor) -> torch.Tensor:
        """This process's own part of a joint batch."""

    def sum(self, params: Params) -> Params:
        """Sums each tensor over processes."""


class OneProcess:
    """A single process: its own batch is the joint one."""

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        return own

    def part(self, joint: torch.Tensor) -> torch.Tensor:
        return joint

    def sum(self, params: Params) -> Params:
        return params


class DistributedBatch:
    """The processes of ``torch.distributed``'s default group, with batches of one size.

    Args:
        dim: the axis along which the samples lie. The joint batch has them in order of rank.
    """

    def __init__(self, dim: int = 0):
        self.dim = dim

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        own = own.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=self.dim)

    def part(self, joint: torch.Tensor) -> torch.Tensor:
        return joint.chunk(dist.get_world_size(), dim=self.dim)[dist.get_rank()]

    def sum(self, params: Params) -> Params:
        """One all-reduce, of all tensors laid end to end."""
        if not params:
            return params
        flat = torch.cat([param.reshape(-1) for param in params.values()])
        dist.all_reduce(flat)
        pieces = flat.split([param.numel() for param in params.values()])
        return {name: piece.view_as(param) for (name, param), piece in zip(params.items(), pieces)}


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx, own: torch.Tensor, processes: DistributedBatch) -> torch.Tensor:
        ctx.processes = processes
        return processes.gather(own)

    @staticmethod
    def backward(ctx, grad_joint: torch.Tensor):
        return ctx.processes.part(grad_joint) * dist.get_world_size(), None


def joined(own: torch.Tensor, processes: Processes) -> torch.Tensor:
    """The joint batch, differentiable once, for a loss that every process evaluates on all of it.

    Each process's loss is then the joint one. Behind the cut a process has the whole gradient, before it only
    that of its own samples; averaging over processes, as DistributedDataParallel does, is right behind
    and divides too often before. So the gradient of the own part is multiplied by their number.

    Args:
        own: this process's samples.
        processes: who else has some.
    """
    return own if isinstance(processes, OneProcess) else _Joined.apply(own, processes)
