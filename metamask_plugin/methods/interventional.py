"""A task beside its backdoor-adjusted self: the two terms of ICL-MSR's regular loss."""

import inspect
from collections.abc import Sequence

import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.modules.batch_norm import frozen_bn_stats
from metamask_plugin.modules.stop_gradient import without_gradient
from metamask_plugin.tasks.base import Task, TaskOutput

LEVELS = ("features", "feature_map", "projection")


class InterventionalTask(nn.Module):
    """L_ct and L_msr on the same projections, Eq. (5) of [0].

    The weight vectors A enter at one of three levels:

    - ``features``: the encoder's pooled features, which the head then projects;
    - ``feature_map``: the channels of the feature map before it is pooled, as Section 4.1 of [0] writes
      it. Where nothing but an average follows the map (ResNet), this is ``features`` by another route;
    - ``projection``: the head's output.

    The anchors and negatives are never weighted; the positives are, which a task with a target network
    takes from there. Under a stop-gradient (SimSiam, a target network) the encoder and the head in that
    branch get no gradient, but A does: it is what the regulariser learns from.

    Args:
        task: what gives both losses.
        level: where A enters.
        tail: from the feature map to features, for ``feature_map`` alone.

    Raises:
        UserError: for a task whose loss takes no other positives.

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """

    def __init__(self, task: Task, level: str, tail: nn.Module | None = None):
        super().__init__()
        if "positives" not in inspect.signature(task.loss).parameters:
            name = type(task).__name__
            raise UserError(f"method_kwargs.task must have a backdoor-adjusted form, got {name}; take simclr")
        self.task, self.level, self.tail = task, level, tail

    def forward(
        self,
        encoded: Sequence[torch.Tensor],
        weights: torch.Tensor | None,
        target_feats: Sequence[torch.Tensor] | None = None,
        feats: Sequence[torch.Tensor] | None = None,
    ) -> tuple[TaskOutput, torch.Tensor | None]:
        """L_ct with its projections and, with weights, L_msr, from what the encoder gives.

        Args:
            encoded: of each view, features (N, D); for ``feature_map`` the map (N, C, h, w).
            weights: A, shape (N, n, C), shared by an image's views; None for L_ct alone.
            target_feats: the target network's features of the large crops, (N, D) each, where there is one.
            feats: features of each view, where they are known besides the map.
        """
        if feats is None:
            feats = encoded if self.tail is None else [self.tail(feature_map) for feature_map in encoded]
        contrast = self.task(feats, target_feats)
        if weights is None:
            return contrast, None
        positives = encoded if target_feats is None else target_feats
        if self.level == "projection":
            positives = contrast.projections if contrast.targets is None else contrast.targets
        if self.task.stop_gradient:
            positives = [view.detach() for view in positives]
        with frozen_bn_stats(self):  # at test time nothing is weighted, and L_ct has counted the batch
            strata = [self._strata(view, weights, index) for index, view in enumerate(positives)]
            return contrast, self.task.loss(contrast.projections, contrast.targets, strata)

    def _strata(self, view: torch.Tensor, weights: torch.Tensor, index: int) -> torch.Tensor:
        """a_t * Z for every t, projected: (N, n, P). Each stratum is a batch of its own for BatchNorm."""
        if self.level == "projection":
            return view[:, None] * weights
        if self.level == "feature_map":
            assert self.tail is not None
            maps = [view * a[:, :, None, None] for a in weights.unbind(1)]
            if self.task.stop_gradient:
                feats = [without_gradient(self.tail, stratum) for stratum in maps]
            else:
                feats = [self.tail(stratum) for stratum in maps]
        else:
            feats = [view * a for a in weights.unbind(1)]
        return torch.stack([self.task.project_key(stratum, index) for stratum in feats], dim=1)
