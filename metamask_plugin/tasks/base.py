"""The interface of a self-supervised task, and what tasks with a target network share."""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from metamask_plugin.errors import check

Projections = Sequence[torch.Tensor]
"""One tensor (N, P) a view."""

Positives = Sequence[torch.Tensor]
"""One tensor a view, (N, P), or (N, n, P): projections whose channels each of n strata has weighted."""


class TaskOutput(NamedTuple):
    """What a task makes of a batch's features.

    Attributes:
        loss: a scalar.
        projections: z of each view, (N, P) each.
        targets: the target network's projections of the large crops; None without one.
    """

    loss: torch.Tensor
    projections: Projections
    targets: Projections | None


class Task(nn.Module, ABC):
    """Heads and loss on top of an encoder's features.

    A subclass says how features are projected and what is the loss of the projections. Both are evaluated
    several times in one iteration (the regular step, the inner step, the outer loss), so neither may change
    anything; what happens once an iteration belongs into :meth:`after_batch` (queues) or :meth:`after_step`
    (target networks), and its state into buffers.

    Args:
        features_dim: D, the encoder's output.

    Attributes:
        source: the task's paper, for the list of tasks.
        negatives: what the loss pushes apart, for the same list.
        projection_dim: P, the dimension of :meth:`project`'s output.
        stop_gradient: whether the branch of the positives, encoder included, gets no gradient (SimSiam).
        target: the target network, None without one.
        large_views: how many of the views, the first ones, are large crops; None: all.
        capturable: whether every iteration evaluates the same operations, and a CUDA graph can replay them.

    Example:
        >>> class Together(Task):
        ...     def __init__(self, features_dim):
        ...         super().__init__(features_dim)
        ...         self.projector = nn.Linear(features_dim, 4)
        ...     def loss(self, projections, targets=None, positives=None):
        ...         return (projections[0] - projections[1]).square().mean()
        >>> Together(8)([torch.ones(6, 8), torch.ones(6, 8)]).loss.item()
        0.0
    """

    source: str
    negatives: str = "none"
    projection_dim: int
    stop_gradient: bool = False
    target: "TargetNetwork | None"
    large_views: int | None = None
    capturable: bool = True
    projector: nn.Module

    def __init__(self, features_dim: int):
        super().__init__()
        self.target = None  # not on the class: there it would hide the module that init_target registers

    def project(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """Projection z of one view's features, (N, D) to (N, P): by ``self.projector``, unless overridden.

        Args:
            feats: the features.
            view: which view they are of; it matters where views have heads of their own (CMC).
        """
        return self.projector(feats)

    def project_key(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """Projection of a positive, (N, D) to (N, P), differentiable in its input.

        :meth:`project`, unless the positive comes from elsewhere: a target network, or the same head under a
        stop-gradient. ICL-MSR sends weighted features through it.
        """
        return self.project(feats, view)

    @abstractmethod
    def loss(
        self,
        projections: Projections,
        targets: Projections | None = None,
        positives: Positives | None = None,
    ) -> torch.Tensor:
        """Loss of one batch.

        Args:
            projections: z of each view, (N, P) each, large crops first.
            targets: the target network's projections of the large crops; None for a task without one.
            positives: what takes the views', or the targets', place as positives, and nowhere else: (N, P)
                each, or (N, n, P) for n strata, over which a likelihood is averaged, or else the loss.

        Returns:
            A scalar.
        """

    def forward(
        self, feats: Sequence[torch.Tensor], target_feats: Sequence[torch.Tensor] | None = None
    ) -> TaskOutput:
        """Projections and loss as one function of the task's parameters: what the meta step differentiates.

        Args:
            feats: features of each view, (N, D) each, masked by the caller.
            target_feats: the target network's features of the large crops, masked alike.
        """
        targets = None if target_feats is None else [self.project_key(h) for h in target_feats]
        projections = [self.project(h, view) for view, h in enumerate(feats)]
        return TaskOutput(self.loss(projections, targets), projections, targets)

    def init_target(self, backbone: nn.Module) -> None:
        """Called once, with the encoder as it was initialised."""

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        """Once a batch, after its last evaluation: queues take it in.

        Args:
            projections: of all views, detached, (N, P) each; of all ranks' batches together.
            targets: likewise.
        """

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, progress: float) -> None:
        """Once an optimiser step, after the meta step: target networks follow.

        Args:
            backbone: the encoder.
            progress: share of all optimiser steps that are done, in [0, 1].
        """


class MomentumTask(Task):
    """A task whose targets come from a moving average of encoder and projection head.

    Subclasses set ``self.projector``, whose average the target's head is. Their losses are given targets.

    Args:
        features_dim: D.
        base_momentum: m of the average at the start of training.
        final_momentum: m at its end.

    Example:
        >>> from metamask_plugin.tasks import BYOL
        >>> task = BYOL(8, proj_hidden_dim=16, proj_output_dim=4, base_momentum=0.0)
        >>> encoder = nn.Linear(12, 8)
        >>> task.init_target(encoder)
        >>> _ = nn.init.ones_(encoder.weight)
        >>> task.after_step(encoder, progress=0.0)  # with m = 0: the target is the encoder
        >>> torch.equal(task.target.trunk.weight, encoder.weight)
        True
    """

    target: "TargetNetwork"  # from init_target on

    def __init__(self, features_dim: int, base_momentum: float, final_momentum: float):
        super().__init__(features_dim)
        name = "method_kwargs.task_kwargs"
        check(
            0 <= base_momentum <= final_momentum <= 1,
            f"{name}.base_momentum",
            f"between 0 and final_momentum ({final_momentum}), that between it and 1",
            base_momentum,
        )
        self.base_momentum, self.final_momentum = base_momentum, final_momentum

    def init_target(self, backbone: nn.Module) -> None:
        self.target = TargetNetwork(backbone, self.projector)

    def project_key(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        return self.target.head(feats)

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, progress: float) -> None:
        momentum = cosine_momentum(self.base_momentum, self.final_momentum, progress)
        self.target.update(backbone, self.projector, momentum)


class TargetNetwork(nn.Module):
    """xi <- m xi + (1 - m) theta, once an optimiser step. BYOL [0], MoCo [1].

    Its weights never require a gradient; its BatchNorm keeps statistics of its own, from its own forwards.

    Args:
        trunk: the online encoder, copied.
        head: the online projection head, copied.

    [0] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.
    [1] He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020.

    Example:
        >>> encoder, head = nn.Linear(3, 2), nn.Linear(2, 2)
        >>> target = TargetNetwork(encoder, head)
        >>> _ = nn.init.zeros_(target.trunk.weight)
        >>> target.update(encoder, head, momentum=0.9)
        >>> torch.allclose(target.trunk.weight, 0.1 * encoder.weight)
        True
    """

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk, self.head = copy.deepcopy(trunk), copy.deepcopy(head)
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, trunk: nn.Module, head: nn.Module, momentum: float) -> None:
        """One step towards the online networks.

        Args:
            trunk: the online encoder.
            head: the online head.
            momentum: m in [0, 1]; 1 leaves the target as it is.
        """
        for mine, online in ((self.trunk, trunk), (self.head, head)):
            for target, source in zip(mine.parameters(), online.parameters()):
                target.lerp_(source.to(target.dtype), 1 - momentum)


def cosine_momentum(base: float, final: float, progress: float) -> float:
    """m at a share of the training: from ``base`` to ``final`` along half a cosine, BYOL Section 3.2.

    Args:
        base: m at the start.
        final: m at the end.
        progress: share of all steps that are done, in [0, 1].
    """
    return final - (final - base) * (math.cos(math.pi * progress) + 1) / 2
