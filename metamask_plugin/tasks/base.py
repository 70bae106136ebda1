"""The interface of a self-supervised task."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import nn


class Task(nn.Module, ABC):
    """Heads and loss on top of an encoder's features.

    A task is called with the features of all views and returns its loss, so that the whole of it,
    heads included, is one function of its parameters: that is what the meta step differentiates.

    Args:
        features_dim: D, the encoder's output.
    """

    def __init__(self, features_dim: int):
        super().__init__()
        self.features_dim = features_dim

    @abstractmethod
    def forward(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Loss of one batch.

        Args:
            views: features of each view, each of shape (N, D), masked by the caller.

        Returns:
            A scalar.
        """

    @abstractmethod
    def project(self, feats: torch.Tensor) -> torch.Tensor:
        """Projection z of one view's features, (N, D) to (N, P); for evaluators that ask for it."""
