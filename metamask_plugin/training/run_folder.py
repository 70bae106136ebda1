"""The folder of a run: where it is, and what it holds."""

import hashlib
import json
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from metamask_plugin.evaluation.files import write_whole

NOT_THE_EXPERIMENT = (
    "auto_resume",
    "checkpoint",
    "evaluation",
    "name",
    "resume_from_checkpoint",
    "wandb",
)
"""Top-level config keys that do not change what is trained, and so not which run it is."""


def experiment_digest(cfg: DictConfig) -> str:
    """Eight hex digits that differ whenever two configs would train something else."""
    container = OmegaConf.to_container(cfg, resolve=True)
    for key in NOT_THE_EXPERIMENT:
        container.pop(key, None)
    return hashlib.sha256(json.dumps(container, sort_keys=True, default=str).encode()).hexdigest()[:8]


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

    def write_args(self, cfg: DictConfig) -> None:
        """Writes ``args.json``, the resolved config, for the evaluators."""
        for folder in (self.path, self.best_checkpoint.parent):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / "args.json", json.dumps(OmegaConf.to_container(cfg, resolve=True), indent=2))
