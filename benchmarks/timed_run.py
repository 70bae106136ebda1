"""``main_pretrain.py``'s own path on images of noise, with a clock on every epoch."""

import contextlib
import csv
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import lightning.pytorch as pl
import torch
from common import synchronise
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli import pretrain
from metamask_plugin.data.registry import DATASETS
from metamask_plugin.data.splits import MemoryImages
from metamask_plugin.training.callbacks import Progress

NOISE = "noise"
"""The data set's name: uint8 noise in the shape of CIFAR-10, ``data.kwargs.images`` of it; no test split."""


class TimedRun(NamedTuple):
    """What a run took.

    Attributes:
        epochs: seconds of each epoch's training, meta steps included.
        steps: iterations in an epoch.
        images: images in an epoch, of all processes.
        rows: ``metrics.csv``, a dict an epoch; ``data_wait_share`` is in it.
        rank_zero: False in the other processes of a distributed run.
    """

    epochs: list[float]
    steps: int
    images: int
    rows: list[dict[str, str]]
    rank_zero: bool

    @property
    def data_wait_share(self) -> float | None:
        """Of the last epoch."""
        share = self.rows[-1].get("data_wait_share") if self.rows else None
        return float(share) if share else None


class _Clock(Progress):
    """The progress bar's place in a run, with a clock in place of the bar."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.epochs: list[float] = []
        self.trainer = trainer

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronise()
        self.started = time.perf_counter()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        synchronise()
        self.epochs.append(time.perf_counter() - self.started)


def noise_images(options: dict[str, Any]) -> tuple[MemoryImages, None]:
    """A data set for :data:`~metamask_plugin.data.registry.DATASETS`."""
    count = options.get("kwargs", {}).get("images", 50_000)
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return MemoryImages(images, torch.arange(count) % 10, [str(label) for label in range(10)]), None


def timed_run(overrides: Sequence[str], config: str = "cifar/metamask_barlow") -> TimedRun:
    """Trains as ``main_pretrain.py --config-name <config> <overrides>`` would, and throws the run away.

    Neither evaluated nor saved. ``data.dataset=noise ++data.kwargs.images=<n>`` trains on noise.
    """
    DATASETS.setdefault(NOISE, noise_images)
    clocks: list[_Clock] = []

    def clock() -> _Clock:
        clocks.append(_Clock())
        return clocks[-1]

    with tempfile.TemporaryDirectory() as folder:
        quiet = ["++evaluation.enabled=False", "++checkpoint.enabled=False", "++auto_resume.enabled=False"]
        with initialize_config_dir(str(SCRIPTS / "pretrain"), version_base="1.2"):
            cfg = compose(config, [*quiet, f"++checkpoint.dir={folder}", *overrides])
        OmegaConf.set_struct(cfg, False)
        with mock.patch.object(pretrain, "Progress", clock), contextlib.redirect_stdout(io.StringIO()):
            path = pretrain.run(cfg).path
        rows = _rows(path / "metrics.csv")
    (found,) = clocks
    trainer = found.trainer
    steps = trainer.num_training_batches
    return TimedRun(
        found.epochs,
        steps,
        steps * cfg.optimizer.batch_size * trainer.world_size,
        rows,
        trainer.is_global_zero,
    )


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():  # the first process writes it
        return []
    with path.open() as file:
        return list(csv.DictReader(file))
