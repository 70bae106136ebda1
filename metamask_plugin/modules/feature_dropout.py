"""Dropout on the features of all views, drawn for each view or once for all: MetaMask's Table 5."""

from collections.abc import Sequence

import torch
from torch import nn

from metamask_plugin.errors import check


class FeatureDropout(nn.Module):
    """Sets features to 0 at random and divides the others by 1 - rate, while training (A.4.5 of [0]).

    Args:
        rate: p, the probability of 0, in [0, 1).
        shared: whether all views of an image lose the same features. The paper's models trained so collapse.

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    """

    def __init__(self, rate: float, shared: bool = False):
        super().__init__()
        check(0 <= rate < 1, "method_kwargs.feature_dropout.rate", "in [0, 1)", rate)
        self.rate, self.shared = rate, shared

    def forward(self, feats: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Features of each view, (N, D) each, to the same."""
        if not self.training or self.rate == 0:
            return list(feats)
        keep = [self._keep(h) for h in (feats[:1] if self.shared else feats)]
        return [h * kept for h, kept in zip(feats, keep * len(feats) if self.shared else keep)]

    def _keep(self, feats: torch.Tensor) -> torch.Tensor:
        """0 with probability p, else 1 / (1 - p)."""
        return nn.functional.dropout(torch.ones_like(feats), self.rate)
