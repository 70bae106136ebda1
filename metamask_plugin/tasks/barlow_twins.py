"""Barlow Twins: make the views' cross-correlation matrix the identity."""

from itertools import combinations
from math import comb

import torch

from metamask_plugin.errors import check, choose
from metamask_plugin.losses.pairs import mean_over_pairs
from metamask_plugin.losses.redundancy_reduction import FORMS, redundancy_reduction_loss
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import Projections, Task


class BarlowTwins(Task):
    """Redundancy reduction, Eqs. (1) and (2) of [0], summed over pairs of views, on a head of three layers.

    A batch of one image has no correlation: the loss is then
    scale_loss * P a pair, without a gradient.

    With ``form="uncentred"`` it is MetaMask's redundancy term, Eqs. (2) and (3) of [1], as a task of its own.

    ICL-MSR's form is the mean of the loss over strata of the weighted view, summed over pairs of views alike.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layers; 8192 in [0], 2048 in solo-learn for CIFAR.
        proj_output_dim: P, the same.
        lamb: lambda of the off-diagonal entries; 0.005 in [0], 0.0051 in the authors' code.
        scale_loss: factor on the loss, a sum over P dimensions and so much longer in gradient than other
            tasks' losses. [0] has none; the authors' first release had 1/32, solo-learn has 0.1 for CIFAR.
        form: of the cross-correlation, see :func:`~metamask_plugin.losses.cross_correlation`; [0] centres by
            BatchNorm.

    [0] Zbontar et al., *Barlow Twins: Self-Supervised Learning via Redundancy Reduction*, ICML 2021.
    [1] Li et al., *MetaMask*, NeurIPS 2022.

    Example:
        >>> task = BarlowTwins(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Zbontar et al., ICML 2021"
    negatives = "none (decorrelated dimensions)"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 2048,
        lamb: float = 5e-3,
        scale_loss: float = 1.0,
        form: str = "centred",
    ):
        super().__init__(features_dim)
        check(lamb >= 0, "method_kwargs.task_kwargs.lamb", ">= 0", lamb)
        check(scale_loss > 0, "method_kwargs.task_kwargs.scale_loss", "> 0", scale_loss)
        self.lamb, self.scale_loss = lamb, scale_loss
        self.form = choose("method_kwargs.task_kwargs.form", form, FORMS)
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim, layers=3)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        if len(projections) < 2:
            raise ValueError(f"BarlowTwins: projections must be of two or more views, got {len(projections)}")
        if positives is not None:
            return comb(len(projections), 2) * mean_over_pairs(self._pair_loss, projections, positives)
        return torch.stack([self._pair_loss(z1, z2) for z1, z2 in combinations(projections, 2)]).sum()

    def _pair_loss(self, z1: torch.Tensor, z2: torch.Tensor) -> torch.Tensor:
        return self.scale_loss * redundancy_reduction_loss(z1, z2, self.lamb, self.form)
