"""The folder of a run: where it is, and what it holds."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_plugin.evaluation.files import write_whole

NOT_THE_EXPERIMENT = (
    "auto_resume",
    "checkpoint",
    "evaluation",
    "name",
    "process_timeout",
    "resume_from_checkpoint",
    "wandb",
)
"""Top-level config keys that do not change what is trained, and so not which run it is."""


def experiment_of(cfg: DictConfig) -> dict[str, Any]:
    """What of a config decides what is trained, as plain values."""
    container = OmegaConf.to_container(cfg, resolve=True)
    return {key: value for key, value in container.items() if key not in NOT_THE_EXPERIMENT}


def experiment_digest(cfg: DictConfig) -> str:
    """Eight hex digits that differ whenever two configs would train something else."""
    text = json.dumps(experiment_of(cfg), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class RunFolder:
    """``<checkpoint.dir>/<method>/<name>-<digest>``: same config, same folder.

    So the same command finds its own run again, finished or not, and a sweep over any setting can
    never resume a neighbour's.

    Args:
        cfg: the complete config.
        resume: continue in the folder if it is there; else a fresh one beside it (``-2``, ``-3`` ...).
    """

    def __init__(self, cfg: DictConfig, resume: bool):
        stem = Path(cfg.checkpoint.dir) / cfg.method / f"{cfg.name}-{experiment_digest(cfg)}"
        path, attempt = stem, 1
        while not resume and path.exists():
            attempt += 1
            path = stem.with_name(f"{stem.name}-{attempt}")
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
    def finished(self) -> Path:
        """Written when the last epoch and its checkpoint are."""
        return self.path / "finished.json"

    def is_complete(self, reported: bool) -> bool:
        """Whether there is nothing left to do.

        Args:
            reported: whether the final report belongs to the run.
        """
        return self.summary.exists() or (self.finished.exists() and not reported)

    def write_args(self, cfg: DictConfig, skipped: Sequence[object] = ()) -> None:
        """Writes ``args.json``, the resolved config, for the evaluators.

        Args:
            cfg: the complete config.
            skipped: images that were left out, a line each, for ``skipped_images.txt``.
        """
        for folder in (self.path, self.best_checkpoint.parent):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "args.json", json.dumps(OmegaConf.to_container(cfg, resolve=True), indent=2))
        if skipped:
            write_whole(self.path / "skipped_images.txt", "".join(f"{image}\n" for image in skipped))
