"""DCL: SimCLR with a denominator corrected for negatives of the anchor's own class."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.contrastive import multi_view_loss
from metamask_plugin.losses.debiased import debiased_negative_mass
from metamask_plugin.tasks.base import Projections
from metamask_plugin.tasks.simclr import SimCLR


class DCL(SimCLR):
    """Debiased contrastive learning [0]: some of an anchor's negatives are of its class, on average tau+ of
    them, and their share is taken out of the denominator.

    Negatives are all views of the other images and the bank's entries; the loss is the mean over the ordered
    pairs of views. ICL-MSR's form is the same with several strata of the positive; with the positive itself
    as the only stratum it is the task's own loss.

    The defaults are those of the authors' release, which trains on STL-10. Where classes are balanced, tau+
    is one over their number: 0.1 on CIFAR-10, 0.01 on CIFAR-100.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        temperature: tau.
        tau_plus: tau+ in [0, 1), the probability that a random image is of the anchor's class. 0: no
            correction.
        proj_layers: of the head.
        final_norm: BatchNorm on the head's output, as the official MetaMask release has it.
        bank_size: K past projections as further negatives; MetaMask's Table 1 and ICL-MSR's Table 2 take
            4,096, DCL none.

    Raises:
        UserError: for settings that cannot be.
        ValueError: from the losses, for a batch of one image, bank or not.

    [0] Chuang et al., *Debiased Contrastive Learning*, NeurIPS 2020.

    Example:
        >>> task = DCL(8, proj_hidden_dim=16, proj_output_dim=4, tau_plus=0.1)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Chuang et al., NeurIPS 2020"
    negatives = "the batch, debiased, memory bank optional"
    beta = 0.0

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 512,
        proj_output_dim: int = 128,
        temperature: float = 0.5,
        tau_plus: float = 0.1,
        proj_layers: int = 2,
        final_norm: bool = False,
        bank_size: int = 0,
    ):
        super().__init__(
            features_dim, proj_hidden_dim, proj_output_dim, temperature, proj_layers, final_norm, bank_size
        )
        check(0 <= tau_plus < 1, "method_kwargs.task_kwargs.tau_plus", "in [0, 1)", tau_plus)
        self.tau_plus = tau_plus

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        positives = projections if positives is None else positives
        mass = debiased_negative_mass(self.tau_plus, self.temperature, self.beta)
        return multi_view_loss(projections, positives, self.temperature, self.bank.entries, mass)
