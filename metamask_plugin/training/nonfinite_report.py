"""What is left of a run that numbers have ended which are none."""

import math
from typing import Any

import lightning.pytorch as pl

from metamask_plugin.errors import NonFiniteError
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.training.run_folder import RunFolder


class NonFiniteReport(pl.Callback):
    """Writes what was seen and of which images, ``nonfinite.json``, and the state then, ``nonfinite.ckpt``.

    That state is for looking at, in the middle of a batch: on the CPU parameters are as they were before the
    step, on a GPU one step has been made with these numbers. To go on, there is ``last.ckpt``. Of several
    processes each writes the images of its own (``nonfinite_rank1.json``).

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if not isinstance(exception, NonFiniteError):
            return
        rank = f"_rank{trainer.global_rank}" if trainer.global_rank else ""
        write_summary(self.folder.path / f"nonfinite{rank}.json", _plain(exception.seen))
        trainer.save_checkpoint(self.folder.path / "nonfinite.ckpt")
        if trainer.is_global_zero:
            print(
                f"state and images of that step: {self.folder.path / 'nonfinite.json'}, nonfinite.ckpt",
                flush=True,
            )


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
