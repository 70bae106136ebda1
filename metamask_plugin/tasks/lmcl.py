"""LMCL: SimCLR, and no pair of projections half near, half far."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.distance_polarization import distance_polarization
from metamask_plugin.tasks.base import Projections
from metamask_plugin.tasks.simclr import SimCLR


class LMCL(SimCLR):
    """Large-margin contrastive learning [0]: L = L_contrast + lambda R, SimCLR's loss and a regulariser
    that polarises the distances between all projections of the batch
    (:func:`~metamask_plugin.losses.distance_polarization.distance_polarization`).

    Under ICL-MSR, L_msr is SimCLR's: R does not look at positives, and so has nothing that strata could
    enter; it is in L_ct already. The bank's entries are negatives of L_contrast and take no part in R.

    The margin and lambda are chosen here, not taken from [0]; tau, the head and the rest are SimCLR's.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        temperature: tau.
        delta_plus: delta+, the margin's lower edge, a distance of (1 - cosine) / 2.
        delta_minus: delta-, its upper edge; 0 <= delta+ < delta- <= 1.
        lamb: lambda >= 0. R is a mean of terms below (delta- - delta+)^2 / 4, 0.0225 by default, so that
            at lambda = 1 it would hardly be felt beside the contrast.
        proj_layers: of the head.
        final_norm: BatchNorm on the head's output, as the official MetaMask release has it.
        bank_size: K past projections as further negatives; ICL-MSR's Table 2 takes 4,096.

    Raises:
        UserError: for settings that cannot be.
        ValueError: from :meth:`loss` with other positives, for a batch of one image.

    [0] Chen et al., *Large-Margin Contrastive Learning with Distance Polarization Regularizer*, ICML 2021.

    Example:
        >>> task = LMCL(8, proj_hidden_dim=16, proj_output_dim=4, lamb=10.0)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Chen et al., ICML 2021"
    negatives = "the batch, memory bank optional"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 256,
        temperature: float = 0.5,
        delta_plus: float = 0.2,
        delta_minus: float = 0.5,
        lamb: float = 10.0,
        proj_layers: int = 2,
        final_norm: bool = False,
        bank_size: int = 0,
    ):
        super().__init__(
            features_dim, proj_hidden_dim, proj_output_dim, temperature, proj_layers, final_norm, bank_size
        )
        name = "method_kwargs.task_kwargs"
        check(
            0 <= delta_plus < delta_minus,
            f"{name}.delta_plus",
            f"between 0 and delta_minus ({delta_minus})",
            delta_plus,
        )
        check(delta_minus <= 1, f"{name}.delta_minus", "<= 1", delta_minus)
        check(lamb >= 0, f"{name}.lamb", ">= 0", lamb)
        self.delta_plus, self.delta_minus, self.lamb = delta_plus, delta_minus, lamb

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        if positives is not None:  # R does not look at positives
            return super().loss(projections, targets, positives)
        polarization = distance_polarization(projections, self.delta_plus, self.delta_minus)
        return super().loss(projections, targets) + self.lamb * polarization
