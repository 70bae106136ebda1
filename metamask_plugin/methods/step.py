"""What one iteration knows, and what a method's regular loss is made of."""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from metamask_plugin.tasks import Projections


@dataclass
class Step:
    """What one iteration knows; tensors without a graph but where it says so.

    Attributes:
        global_step: optimiser steps made before it.
        indexes: of the images in the data set, (N,).
        views: augmented images of each view, (N, 3, H, W) each, large crops first.
        original: un-augmented images (N, 3, H, W), where the data come with them.
        target_feats: the target network's features of the global batch's large crops, (N, D) each.
        projections: the task's, of the global batch, (N, P) each.
        targets: the target network's projections.
        metrics: to log, once the step has been made.
        rates: learning rates of the main optimiser's step, one a parameter group.
    """

    global_step: int
    indexes: torch.Tensor
    views: list[torch.Tensor]
    original: torch.Tensor | None
    target_feats: list[torch.Tensor] | None = None
    projections: list[torch.Tensor] = field(default_factory=list)
    targets: list[torch.Tensor] | None = None
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)
    rates: list[float] | None = None


class RegularLoss(NamedTuple):
    """What a method's regular loss is made of.

    Attributes:
        loss: a scalar, with a graph.
        parts: its terms, to log.
        projections: the task's, for its queues.
        targets: the target network's projections; None without one.
    """

    loss: torch.Tensor
    parts: dict[str, torch.Tensor]
    projections: Projections
    targets: Projections | None
