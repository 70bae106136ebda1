"""The interface of a self-supervised task."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn

from metamask_plugin.errors import UserError


class Task(nn.Module, ABC):
    """Heads and loss on top of an encoder's features.

    A task is called with the features of all views and returns its loss, so that the whole of it,
    heads included, is one function of its parameters: that is what the meta step differentiates.

    Args:
        features_dim: D, the encoder's output.

    Attributes:
        projection_dim: P, the dimension of :meth:`project`'s output.
    """

    projection_dim: int

    def __init__(self, features_dim: int):
        super().__init__()
        self.features_dim = features_dim

    def forward(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Loss of one batch.

        Args:
            views: features of each view, each of shape (N, D), masked by the caller.

        Returns:
            A scalar.
        """
        return self.loss([self.project(feats) for feats in views])

    @abstractmethod
    def project(self, feats: torch.Tensor) -> torch.Tensor:
        """Projection z of one view's features, (N, D) to (N, P); for evaluators that ask for it."""

    @abstractmethod
    def loss(self, projections: Sequence[torch.Tensor]) -> torch.Tensor:
        """Loss of one batch, from the projection (N, P) of each view."""

    def backdoor_adjusted_loss(
        self, projections: Sequence[torch.Tensor], weighted: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """ICL-MSR's L_msr for this task.

        Args:
            projections: of each view, (N, P) each.
            weighted: of each view with its channels weighted by each stratum, (N, n, P) each.

        Returns:
            A scalar.

        Raises:
            UserError: for a task without such a form.
        """
        raise UserError(
            f"method_kwargs.task must have a backdoor-adjusted form, got {type(self).__name__}; take simclr"
        )
