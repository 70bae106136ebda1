"""The interface of a self-supervised task."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from metamask_plugin.errors import UserError, check
from metamask_plugin.modules.target_network import TargetNetwork, cosine_momentum

Projections = Sequence[torch.Tensor]
"""One tensor (N, P) a view."""

Strata = Sequence[torch.Tensor]
"""One tensor (N, n, P) a view: its projections with their channels weighted by each of n strata."""


class Task(nn.Module, ABC):
    """Heads and loss on top of an encoder's features.

    A subclass says how features are projected and what is the loss of the projections. Both are
    evaluated several times in one iteration (the regular step, the trial step, the outer loss), so neither
    may change anything; what happens once an iteration belongs into :meth:`after_batch` (queues) or
    :meth:`after_step` (target networks), and its state into buffers.

    Args:
        features_dim: D, the encoder's output.

    Attributes:
        source: the task's paper, for the list of tasks.
        negatives: what the loss pushes apart, for the same list.
        past_negatives: the queue whose entries are among them, by its attribute and its setting.
        projection_dim: P, the dimension of :meth:`project`'s output.
        stop_gradient: whether the positive branch, the encoder in it included, gets no gradient (SimSiam).
        target: the target network, None without one.
        large_views: how many of the views, the first ones, are large crops; None: all.
        joint_batch: whether the loss is to be given the joint batch of all processes; a task that exchanges
            what it needs by itself gets its own part.
        defined: whether the loss always is a number; else it may be NaN where it has nothing to compare,
            with a gradient of zero.
        capturable: whether every iteration evaluates the same operations, and a CUDA graph can replay them.
        resumes_within_epoch: whether parameters and buffers are all that an epoch's next batch depends on.
    """

    source: str
    negatives: str = "none"
    past_negatives: tuple[str, str] = ("bank", "bank_size")
    projection_dim: int
    stop_gradient: bool = False
    target: TargetNetwork | None
    large_views: int | None = None
    joint_batch: bool = True
    defined: bool = True
    capturable: bool = True
    resumes_within_epoch: bool = True

    def __init__(self, features_dim: int):
        super().__init__()
        self.features_dim = features_dim
        self.target = None  # not on the class: there it would hide the module that start_target registers

    @abstractmethod
    def project(self, feats: torch.Tensor) -> torch.Tensor:
        """Projection z of one view's features, (N, D) to (N, P)."""

    @abstractmethod
    def loss(self, projections: Projections, targets: Projections | None = None) -> torch.Tensor:
        """Loss of one batch.

        Args:
            projections: z of each view, (N, P) each, large crops first.
            targets: the target network's projections of the large crops; None for a task without one.

        Returns:
            A scalar.
        """

    def forward(
        self, feats: Sequence[torch.Tensor], target_feats: Sequence[torch.Tensor] | None = None
    ) -> torch.Tensor:
        """The loss as one function of the task's parameters: what the meta step differentiates.

        Args:
            feats: features of each view, (N, D) each, masked by the caller.
            target_feats: the target network's features of the large crops, masked alike.
        """
        return self.loss(*self.branches(feats, target_feats))

    def branches(
        self, feats: Sequence[torch.Tensor], target_feats: Sequence[torch.Tensor] | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Projections of each view, and the targets (None without a target network)."""
        targets = None if target_feats is None else [self.project_positive(h) for h in target_feats]
        return [self.project(h) for h in feats], targets

    def project_positive(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """Projection of the positive branch, (N, D) to (N, P), differentiable in its input.

        :meth:`project`, unless the positive comes from elsewhere: a target network, or the same head
        under a stop-gradient. ICL-MSR sends weighted features through it.

        Args:
            feats: features of one view, (N, D).
            view: which view they are of; it matters where views have heads of their own (CMC).
        """
        return self.project(feats)

    def backdoor_adjusted_loss(
        self, projections: Projections, targets: Projections | None, weighted: Strata
    ) -> torch.Tensor:
        """ICL-MSR's L_msr for this task.

        Args:
            projections: as for :meth:`loss`.
            targets: as for :meth:`loss`.
            weighted: positives with their channels weighted by each stratum, (N, n, P) each: of every
                view, or of every target where there is a target network.

        Returns:
            A scalar.

        Raises:
            UserError: for a task without such a form.
        """
        raise UserError(
            f"method_kwargs.task must have a backdoor-adjusted form, got {type(self).__name__}; take simclr"
        )

    def start_target(self, backbone: nn.Module) -> None:
        """Called once, with the encoder as it was initialised."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the main optimiser trains of the task, in groups; a target network follows it instead."""
        return [{"name": "task", "params": [param for param in self.parameters() if param.requires_grad]}]

    def check_meta_step(self, processes: int) -> None:
        """Raises a UserError where the loss has no second derivative.

        Args:
            processes: how many train together.
        """

    def start_training(self, trainer: Any) -> None:
        """Called once training starts, with Lightning's trainer."""

    def own_negatives(self, images: int, views: int) -> str | None:
        """A warning where images meet their own past projections as negatives.

        Args:
            images: in an epoch, of all processes.
            views: of each image.
        """
        attribute, setting = self.past_negatives
        size = len(getattr(self, attribute, ()))
        if size <= images * views:
            return None
        return (
            f"warning: method_kwargs.task_kwargs.{setting}={size} holds projections of more than one epoch "
            f"({images} images, {views} views): images meet their own as negatives; take at most {images}"
        )

    def start_epoch(self) -> None:
        """Called when an epoch starts."""

    def observe(self, indexes: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        """Called before a batch's losses are evaluated, for tasks to which its images are not all.

        Args:
            indexes: of the images in the data set, (N,).
            labels: (N,), -1 where there is none.
            number: of the batch in its epoch, from 0.
        """

    def start_regular_loss(self) -> None:
        """Called before the regular loss of a batch, which a meta step may precede or follow."""

    def after_backward(self) -> None:
        """Called between the regular loss's backward pass and the optimiser's step."""

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        """Once a batch, after its last evaluation: queues take it in.

        Args:
            projections: of all views, detached, (N, P) each; of all processes' batches together.
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
    """

    projector: nn.Module
    target: TargetNetwork  # from start_target on

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

    def start_target(self, backbone: nn.Module) -> None:
        self.target = TargetNetwork(backbone, self.projector)

    def project_positive(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        return self.target.head(feats)

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, progress: float) -> None:
        momentum = cosine_momentum(self.base_momentum, self.final_momentum, progress)
        self.target.update(backbone, self.projector, momentum)
