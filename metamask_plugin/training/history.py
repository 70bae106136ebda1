"""One row an epoch: everything that was logged, and the mask as it then was."""

import csv
import io
from typing import Any

import lightning.pytorch as pl
import torch

from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.training.run_folder import RunFolder


def is_knn(metric: str) -> bool:
    """Whether a metric is one that the evaluation measures, and not the training step."""
    return metric.startswith("knn")


class History(pl.Callback):
    """Collects epoch metrics into ``metrics.csv``; its rows travel in the checkpoint.

    So a resumed run has its whole past, and the file is written anew each epoch, never appended to.

    Args:
        folder: the run's folder.

    Attributes:
        rows: one dict an epoch: ``epoch`` (from 0), ``step``, and the logged metrics.
        masks: the mask after each epoch, shape (D,) each; empty for methods without one.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder
        self.rows: list[dict[str, Any]] = []
        self.masks: list[torch.Tensor] = []
        self._initial_mask: torch.Tensor | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if hasattr(pl_module, "mask") and self._initial_mask is None:  # a resumed run has brought it along
            self._initial_mask = pl_module.mask.values().cpu().clone()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch
        if self.rows and self.rows[-1]["epoch"] == epoch:  # max_steps had cut it short, and now it is whole
            self.rows.pop()
            del self.masks[len(self.rows) :]
        pl_module.log("learning_rate", trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        # of kNN Lightning keeps showing the last values; this epoch's are added once they are measured
        metrics = {name: value for name, value in metrics.items() if not is_knn(name)}
        row = {"epoch": epoch, "step": trainer.global_step, **metrics}
        if hasattr(pl_module, "mask"):
            self.masks.append(pl_module.mask.values().cpu().clone())
            row["mask_largest_movers"] = self._largest_movers()
        self.rows.append(row)
        if trainer.is_global_zero:
            self.write()

    def add(self, accuracies: dict[str, float]) -> None:
        """Adds what was measured of the last epoch after it was recorded."""
        self.rows[-1] |= accuracies
        self.write()

    def _largest_movers(self, count: int = 5) -> str:
        """The dimensions whose weight changed most in this epoch, e.g. ``17:+0.031 4:-0.028``."""
        before = self.masks[-2] if len(self.masks) > 1 else self._initial_mask
        change = self.masks[-1] - before
        movers = change.abs().topk(min(count, len(change))).indices.tolist()
        return " ".join(f"{i}:{change[i]:+.3f}" for i in movers)

    def write(self) -> None:
        """Writes ``metrics.csv``; a metric that an epoch lacks is an empty cell."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for row in self.rows for key in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        write_whole(self.folder.path / "metrics.csv", text.getvalue())

    def best(self, metric: str) -> dict[str, Any] | None:
        """The row with the highest ``metric``; ``None`` if no row has it."""
        rows = [row for row in self.rows if metric in row]
        return max(rows, key=lambda row: row[metric], default=None)

    def mean(self, metric: str) -> float | None:
        """The mean of ``metric`` over the epochs that have it; ``None`` if none has."""
        values = [row[metric] for row in self.rows if metric in row]
        return sum(values) / len(values) if values else None

    def state_dict(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "masks": torch.stack(self.masks) if self.masks else None,
            "initial_mask": self._initial_mask,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = list(state["rows"])
        self.masks = [] if state["masks"] is None else list(state["masks"])
        self._initial_mask = state.get("initial_mask")
