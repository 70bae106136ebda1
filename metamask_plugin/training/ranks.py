"""What each of several processes has of its own: its random draws, and its part of the shared checkpoint."""

import random
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch


class RankDraws(pl.Callback):
    """Gives each of several processes random numbers of its own, by seed, epoch and rank.

    All processes build the model from one seed, so that their weights agree; without this they would also
    draw the same augmentations for different images. After the start, nothing that is drawn from the global
    generators has to agree: W-MSE's slices are broadcast, and the order of the images, DALI's seeds and those
    of the workers come from generators of their own. A single process keeps its one sequence.

    Must stand behind the callback that restores a resumed run's generators: an epoch that is resumed in its
    middle goes on with those of the checkpoint, which has them for each rank.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            key = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
            of_torch, of_numpy, of_python = key.generate_state(3)
            torch.manual_seed(int(of_torch))  # CUDA's, too
            np.random.seed(of_numpy)
            random.seed(int(of_python))


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
