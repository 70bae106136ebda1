"""CMC: two views, contrasted with each other only."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from metamask_plugin.errors import check
from metamask_plugin.losses.cmc import cmc_loss
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import Projections, Task


class CMC(Task):
    """Contrastive Multiview Coding [0] of two views.

    An image of one view has to be told among images of the other: negatives are the other view of the
    batch's other images, and that view's bank of past projections.

    What differs from [0]: its views are channels of an image (luminance and chrominance), each with its own
    encoder and head. Here they are augmented views of one kind, which share the encoder and, unless
    ``shared_head=False``, the head. There, a head is one linear layer, and the bank holds one entry an image,
    sampled for noise-contrastive estimation; here, a head has a hidden layer, and the bank is first in first
    out, with the softmax as it stands (InfoNCE).

    The bank's entries are as old as it is long. While the weights still move fast they are too easily told
    from the present ones, and the loss teaches little: docs/results.md has numbers.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the heads' hidden layer, chosen here.
        proj_output_dim: P, the projections' dimension; 128 in the authors' release.
        temperature: tau; 0.07 in the release, on ImageNet.
        bank_size: K past projections of each view as further negatives, 0 for none; MetaMask's Table 1
            takes 4,096, and so does ICL-MSR's Table 2.
        shared_head: one head for both views, or one each.

    Raises:
        UserError: for settings that cannot be; from :meth:`loss`, for any number of views but two.

    [0] Tian et al., *Contrastive Multiview Coding*, ECCV 2020.

    Example:
        >>> task = CMC(8, proj_hidden_dim=16, proj_output_dim=4, bank_size=32)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    projector: nn.ModuleList
    source = "Tian et al., ECCV 2020"
    negatives = "the other view: batch and memory bank"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 128,
        temperature: float = 0.07,
        bank_size: int = 4096,
        shared_head: bool = True,
    ):
        super().__init__(features_dim)
        check(temperature > 0, "method_kwargs.task_kwargs.temperature", "> 0", temperature)
        self.temperature = temperature
        self.projection_dim = proj_output_dim
        self.projector = nn.ModuleList(
            projection_head(features_dim, proj_hidden_dim, proj_output_dim)
            for _ in range(1 if shared_head else 2)
        )
        banks = nn.ModuleList(FeatureQueue(bank_size, proj_output_dim, negatives=True) for _ in range(2))
        self.banks = cast("Sequence[FeatureQueue]", banks)

    def project(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """Projection by the head of ``view``; the first one's for features that are of no view."""
        return self.projector[view % len(self.projector)](feats)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        name = "the number of views (num_crops in augmentations)"
        check(len(projections) == 2, name, "2 for the task cmc", len(projections))
        return cmc_loss(projections, self.temperature, [bank.entries for bank in self.banks], positives)

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        for bank, view in zip(self.banks, projections):
            bank.push(view)
