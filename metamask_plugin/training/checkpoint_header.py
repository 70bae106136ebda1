"""What a checkpoint says of itself, without its tensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BEST = "BestCheckpoint"
"""Under which key a checkpoint holds what is known of the best epoch."""


@dataclass(frozen=True)
class CheckpointHeader:
    """Of which run a checkpoint is, and how far it has come.

    Attributes:
        experiment: see :func:`~metamask_plugin.training.experiment.experiment_of`.
        steps: optimiser steps.
        epochs: whole epochs.
        best: the best epoch so far, ``metric``, ``epoch`` and ``value``; None where none was measured.
    """

    experiment: dict[str, Any]
    steps: int
    epochs: int
    best: dict[str, Any] | None


def header_of(checkpoint: Path) -> CheckpointHeader | None:
    """Reads a checkpoint's header; None where the file is missing, damaged, or does not say of what it is."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return CheckpointHeader(
            experiment=dict(state["identity"]),
            steps=state["global_step"],
            epochs=state["epoch"] + (0 if state["batches_done"] else 1),
            best=state["callbacks"].get(BEST),
        )
    except Exception:  # in whatever way it is damaged: whoever resumes from it will be told
        return None
