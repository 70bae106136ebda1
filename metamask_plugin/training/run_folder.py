"""The folder of a run: what it holds, and whether anything is left to do."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.evaluation.files import read_json, write_whole
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.training.checkpoint_header import header_of


class RunFolder:
    """The files of one run.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path):
        self.path = path

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The one before the last."""
        return self.path / "previous.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "best" / "best.ckpt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def table(self) -> Path:
        return self.path / "table.txt"

    @property
    def finished(self) -> Path:
        """Written when the last epoch and its checkpoint are."""
        return self.path / "finished.json"

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained to its end."""
        return bool(_read(self.finished))

    def is_complete(self, with_checkpoint: bool, evaluation: Mapping[str, Any] | None) -> bool:
        """Whether there is nothing left to do.

        Args:
            with_checkpoint: whether the run is to leave a checkpoint.
            evaluation: settings of the final report that is wanted; None for no report.
        """
        finished, last = _read(self.finished), header_of(self.last_checkpoint) if with_checkpoint else None
        if not finished or (with_checkpoint and (last is None or last.steps != finished.get("steps"))):
            return False
        return evaluation is None or (
            self.table.exists() and _read(self.summary).get("evaluated_with") == evaluation
        )

    @property
    def has_begun(self) -> bool:
        """Whether there is something to go on with, or nothing left to do."""
        return self.is_finished or self.last_checkpoint.exists()

    def start(self, cfg: DictConfig, skipped: Sequence[object], anew: bool) -> None:
        """Makes the folder and writes ``args.json``, the resolved config, for the evaluators.

        Args:
            cfg: the complete config.
            skipped: images that were left out, a line each, for ``skipped_images.txt``.
            anew: whether the run begins at its first step.
        """
        if anew:
            self.finished.unlink(missing_ok=True)
        for folder in (self.path, self.best_checkpoint.parent):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "args.json", json.dumps(OmegaConf.to_container(cfg, resolve=True), indent=2))
        if skipped:
            write_whole(self.path / "skipped_images.txt", "".join(f"{image}\n" for image in skipped))

    def finish(self, epochs: int, steps: int, seconds: float) -> None:
        """Records that the run was trained to its end.

        Args:
            epochs: trained in all.
            steps: of the optimiser in all.
            seconds: of the last process.
        """
        write_summary(self.finished, {"epochs": epochs, "steps": steps, "seconds": round(seconds, 1)})


def _read(path: Path) -> dict[str, Any]:
    def fault_of(content: Any) -> str | None:
        return None if isinstance(content, dict) else "it holds no mapping"

    return read_json(path, fault_of, "the run goes on without it") or {}


class SameFolder(pl.Callback):
    """Gives all ranks the folder of rank 0; one that starts later may have chosen the next free one.

    Args:
        folder: of the run; only rank 0 has written into it so far.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder.path = Path(trainer.strategy.broadcast(str(self.folder.path)))
