"""SSL-HSIC: make projections depend on the image they show, and on nothing else."""

import torch

from metamask_plugin.errors import check, choose
from metamask_plugin.losses.hsic import KERNELS, SMALLEST_SCALE, hsic_loss
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import MomentumTask, Projections


class SSLHSIC(MomentumTask):
    """-HSIC(Z, Y) + gamma sqrt( HSIC(Z, Z) ), Eq. (4) of [0], in BYOL's architecture [1].

    Z are, as in the official release, the online network's predictions of all views and the target
    network's projections of the large crops, together: any two of one image are a positive pair, also an
    online and a target output of the same crop.

    L_msr is the mean over strata of this loss with the targets of all large crops weighted by the stratum;
    [2] has no formula for a loss without a likelihood.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the projection head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        pred_hidden_dim: width of the predictor's hidden layer; None: proj_hidden_dim, as in [1].
        gamma: weight of the second term; 3 in [0].
        kernel: ``imq`` (inverse multiquadric, [0]), ``gaussian`` or ``linear``, on normalised projections.
        scale: c of the kernel, fixed here. The release starts at 1 and adapts it, maximising the mean
            log of the kernel's derivative by the squared distance; the encoder gets no gradient of that.
        base_momentum: of the target network at the start; 0.99 in the release.
        final_momentum: of the target network at the end.

    [0] Li et al., *Self-Supervised Learning with Kernel Dependence Maximization*, NeurIPS 2021;
        release: github.com/google-deepmind/ssl_hsic.
    [1] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.
    [2] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.

    Example:
        >>> task = SSLHSIC(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> encoder, views = torch.nn.Linear(12, 8), [torch.randn(6, 12), torch.randn(6, 12)]
        >>> task.init_target(encoder)
        >>> out = task([encoder(x) for x in views], [task.target.trunk(x) for x in views])
        >>> out.loss.shape, out.targets[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Li et al., NeurIPS 2021"
    negatives = "the batch, by its mean kernel"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 4096,
        proj_output_dim: int = 256,
        pred_hidden_dim: int | None = None,
        gamma: float = 3.0,
        kernel: str = "imq",
        scale: float = 1.0,
        base_momentum: float = 0.99,
        final_momentum: float = 1.0,
    ):
        super().__init__(features_dim, base_momentum, final_momentum)
        name = "method_kwargs.task_kwargs"
        check(gamma >= 0, f"{name}.gamma", ">= 0", gamma)
        check(scale >= SMALLEST_SCALE, f"{name}.scale", f">= {SMALLEST_SCALE}", scale)
        pred_hidden_dim = proj_hidden_dim if pred_hidden_dim is None else pred_hidden_dim
        check(pred_hidden_dim >= 1, f"{name}.pred_hidden_dim", ">= 1", pred_hidden_dim)
        self.gamma, self.kernel, self.scale = gamma, choose(f"{name}.kernel", kernel, KERNELS), scale
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)
        self.predictor = projection_head(proj_output_dim, pred_hidden_dim, proj_output_dim)

    def project(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        return self.predictor(self.projector(feats))

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        if positives is None:
            return hsic_loss([*projections, *targets], self.gamma, self.kernel, self.scale)
        strata = torch.stack([z if z.dim() == 3 else z[:, None] for z in positives]).unbind(2)
        return torch.stack([self.loss(projections, stratum.unbind()) for stratum in strata]).mean()
