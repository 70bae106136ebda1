"""Where the schedules by step stand in a run that is resumed with another number of steps per epoch."""

from typing import Any

import lightning.pytorch as pl

PER_EPOCH = "steps_per_epoch"


class SchedulePosition:
    """Counts the optimiser steps of the schedule, which are those of the run unless its epochs change length.

    Another batch size, number of devices, accumulation or share of the data gives an epoch another number of
    steps. A schedule that counted on from the old steps would be at another point of the training: with twice
    the batch, half-way through, at its end, with a learning rate of 0 and a target network that stands still.
    So the position is converted when a checkpoint is loaded, and keeps its share of the epochs.

    Attributes:
        offset: schedule steps less optimiser steps.
    """

    def __init__(self) -> None:
        self.offset = 0

    def save(self, trainer: pl.Trainer, checkpoint: dict[str, Any]) -> None:
        """Adds the position to a checkpoint."""
        checkpoint["schedule"] = {"offset": self.offset, PER_EPOCH: _steps_per_epoch(trainer)}

    def load(self, trainer: pl.Trainer, checkpoint: dict[str, Any], by_step: bool) -> None:
        """Reads a checkpoint's position, and converts it where epochs have another length.

        Args:
            trainer: that is to go on.
            checkpoint: its ``lr_schedulers`` are changed in place.
            by_step: whether these count steps, not epochs.
        """
        saved = checkpoint.get("schedule")
        if saved is None:  # of an earlier version
            return
        self.offset = saved["offset"]
        here, there = _steps_per_epoch(trainer), saved[PER_EPOCH]
        if None in (here, there) or here == there:
            return
        before = checkpoint["global_step"] + self.offset
        after = round(before * here / there)
        self.offset = after - checkpoint["global_step"]
        for schedule in checkpoint["lr_schedulers"] if by_step else []:
            schedule["last_epoch"] = after
        if trainer.is_global_zero:
            print(
                f"note: an epoch has {here:g} steps here and had {there:g} where the checkpoint was saved; "
                f"schedules go on at step {after} of {trainer.estimated_stepping_batches}",
                flush=True,
            )


def _steps_per_epoch(trainer: pl.Trainer) -> float | None:
    """None where ``max_steps`` or the time ends the run, and no schedule counts epochs."""
    if trainer.max_steps != -1 or (trainer.max_epochs or -1) < 1:
        return None
    return trainer.estimated_stepping_batches / trainer.max_epochs
