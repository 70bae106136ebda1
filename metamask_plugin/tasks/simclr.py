"""SimCLR: contrast each view with every other image's views."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses import multi_view_loss, nt_xent_loss
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import Projections, Task


class SimCLR(Task):
    """NT-Xent on a projection head's output: Eq. (1) of [1].

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        temperature: tau; [0] uses 0.5 on CIFAR-10 and 0.1 on ImageNet.
        proj_layers: of the head; 2, and 3 in SimCLRv2 [2].
        final_norm: BatchNorm on the head's output, as the official MetaMask release has it.
        bank_size: K past projections as further negatives; MetaMask's Table 1 takes 4,096, SimCLR none.

    [0] Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, ICML 2020.
    [1] Li et al., *MetaMask*, NeurIPS 2022.
    [2] Chen et al., *Big Self-Supervised Models are Strong Semi-Supervised Learners*, NeurIPS 2020.

    Example:
        >>> task = SimCLR(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Chen et al., ICML 2020"
    negatives = "the batch, memory bank optional"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 256,
        temperature: float = 0.5,
        proj_layers: int = 2,
        final_norm: bool = False,
        bank_size: int = 0,
    ):
        super().__init__(features_dim)
        check(proj_layers >= 1, "method_kwargs.task_kwargs.proj_layers", ">= 1", proj_layers)
        check(temperature > 0, "method_kwargs.task_kwargs.temperature", "> 0", temperature)
        self.temperature = temperature
        self.projection_dim = proj_output_dim
        self.projector = projection_head(
            features_dim, proj_hidden_dim, proj_output_dim, proj_layers, final_norm
        )
        self.bank = FeatureQueue(bank_size, proj_output_dim, negatives=True)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        if positives is None:
            return nt_xent_loss(projections, self.temperature, bank=self.bank.entries)
        return multi_view_loss(projections, positives, self.temperature, self.bank.entries)

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        self.bank.push(torch.cat(list(projections)))
