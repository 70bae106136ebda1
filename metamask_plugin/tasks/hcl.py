"""HCL: DCL with hard negatives weighing more."""

from metamask_plugin.errors import check
from metamask_plugin.tasks.dcl import DCL


class HCL(DCL):
    """Contrastive learning with hard negative samples [0]: :class:`~metamask_plugin.tasks.dcl.DCL` whose
    negatives are weighted by the beta-th power of their exponentials, so that those near the anchor count
    for more.

    tau, tau+, beta and P are those of the authors' release on STL-10, where of beta = 0.5, 1, 2 and 6 the
    best is 1; the head's width is DCL's. Other data sets may want others.

    Args:
        features_dim: as for DCL, and so are the others but beta.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        temperature: tau.
        tau_plus: tau+ in [0, 1), the probability that a random image is of the anchor's class.
        beta: >= 0, how much more a hard negative weighs; 0 is DCL.
        proj_layers: of the head.
        final_norm: BatchNorm on the head's output.
        bank_size: K past projections as further negatives; MetaMask's Table 1 takes 4,096, HCL none.

    Raises:
        UserError: for settings that cannot be.
        ValueError: from the losses, for a batch of one image, bank or not.

    [0] Robinson et al., *Contrastive Learning with Hard Negative Samples*, ICLR 2021.

    Example:
        >>> import torch
        >>> task = HCL(8, proj_hidden_dim=16, proj_output_dim=4, beta=1.0)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Robinson et al., ICLR 2021"
    negatives = "the batch, debiased and hard, memory bank optional"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 512,
        proj_output_dim: int = 128,
        temperature: float = 0.5,
        tau_plus: float = 0.1,
        beta: float = 1.0,
        proj_layers: int = 2,
        final_norm: bool = False,
        bank_size: int = 0,
    ):
        super().__init__(
            features_dim,
            proj_hidden_dim,
            proj_output_dim,
            temperature,
            tau_plus,
            proj_layers,
            final_norm,
            bank_size,
        )
        check(beta >= 0, "method_kwargs.task_kwargs.beta", ">= 0", beta)
        self.beta = beta
