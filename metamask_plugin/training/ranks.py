"""What each of several processes has of its own, in the one checkpoint that all share."""

from typing import Any

import lightning.pytorch as pl
import torch


def of_all_ranks(mine: Any) -> list[Any]:
    """Every rank's value, in their order; every rank must call it. Plain values and tensors on the CPU."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, mine)
    return values


def of_this_rank(trainer: pl.Trainer, values: list[Any] | None) -> Any | None:
    """This rank's among what :func:`of_all_ranks` gave; None where other processes saved it."""
    if not isinstance(values, list) or len(values) != trainer.world_size:
        return None
    return values[trainer.global_rank]
