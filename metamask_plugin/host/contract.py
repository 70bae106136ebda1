"""What a host promises, written once. ``tests/host`` holds every host to it.

A batch is ``[indexes, views, targets]``: indexes (N,), a list of ``num_large_crops +
num_small_crops`` view tensors (N, 3, H, W), targets (N,). A validation batch is ``[X, targets]``.
"""

from typing import Any, Protocol

import torch
from omegaconf import DictConfig
from torch import nn

REQUIRED_KEYS = (
    "method",
    "backbone.name",
    "data.dataset",
    "data.num_classes",
    "data.num_large_crops",
    "data.num_small_crops",
    "max_epochs",
    "optimizer.name",
    "optimizer.batch_size",
    "optimizer.lr",
    "optimizer.classifier_lr",
    "optimizer.weight_decay",
    "scheduler.name",
)
"""Config keys that must be there when ``BaseMethod`` is built."""

DEFAULTS: dict[str, Any] = {
    "backbone.kwargs": {},
    "optimizer.exclude_bias_n_norm_wd": False,
    "optimizer.kwargs": {},
    "accumulate_grad_batches": 1,
    "scheduler.lr_decay_steps": None,
    "scheduler.min_lr": 0.0,
    "scheduler.warmup_start_lr": 3e-5,
    "scheduler.warmup_epochs": 10,
    "scheduler.interval": "step",
    "knn_eval.enabled": False,
    "knn_eval.k": 20,
    "knn_eval.distance_func": "euclidean",
    "performance.disable_channel_last": False,
    "method_kwargs": {},
}
"""Config keys that ``BaseMethod.add_and_assert_specific_cfg`` fills in when they are missing."""

OPTIMIZERS = ("sgd", "lars", "adam", "adamw")
SCHEDULERS = ("warmup_cosine", "step", "none")


class Method(Protocol):
    """The members of ``BaseMethod`` that our methods rely on; it is a LightningModule."""

    cfg: DictConfig
    backbone: nn.Module
    """Images (N, 3, H, W) to features (N, ``features_dim``)."""
    features_dim: int
    classifier: nn.Module
    """The online linear classifier, (N, features_dim) to (N, num_classes), on detached features."""
    num_large_crops: int
    num_small_crops: int
    num_crops: int
    """Views that ``training_step`` expects, and runs through the backbone: both kinds together."""
    multicrop: bool
    """Whether there are small crops among them."""
    scheduler: str
    """``scheduler.name``; with ``none``, ``configure_optimizers`` returns the optimiser alone."""
    no_channel_last: bool

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in :data:`DEFAULTS`, in place, and returns the config."""

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Parameter groups of the main optimiser, each with a ``name``; the first is ``backbone``."""

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns at least ``feats`` (N, features_dim) and ``logits`` (N, num_classes)."""

    def training_step(self, batch: list, batch_idx: int) -> dict[str, Any]:
        """Returns ``loss`` (online classifier), ``acc1``, ``acc5``, and what ``forward`` gives as lists
        with one entry a view (``feats``, ``logits``). Runs each view through the backbone on its own, so
        that BatchNorm sees one view."""
