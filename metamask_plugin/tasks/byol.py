"""BYOL: predict what the target network makes of another view."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.pairs import byol_loss, mean_over_pairs
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import MomentumTask, Projections


class BYOL(MomentumTask):
    """Eq. (2) of [0] on a predictor's output, averaged over ordered pairs of views.

        mean over j != k of   2 - 2 cos(q(z_j), z'_k)

    z'_k, the target network's projection of a large crop; q(z_j), the prediction from any view. [0] sums its
    two pairs of views; the mean here does not depend on how many views there are. The predictor sees the
    unweighted projections alone. Images do not meet in the loss, but in the heads' BatchNorm, which wants
    two of them in training mode.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        pred_hidden_dim: width of the predictor's hidden layer; None: proj_hidden_dim, since predictor and
            head are of one architecture in [0].
        base_momentum: m of the target network at the start; [1] starts from 0.99, [0] from 0.996 (1,000
            epochs on ImageNet).
        final_momentum: m at the end, reached along a cosine.

    [0] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.
    [1] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.

    Example:
        >>> task = BYOL(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> encoder, views = torch.nn.Linear(12, 8), [torch.randn(6, 12), torch.randn(6, 12)]
        >>> task.init_target(encoder)
        >>> out = task([encoder(x) for x in views], [task.target.trunk(x) for x in views])
        >>> out.loss.shape, out.targets[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Grill et al., NeurIPS 2020"
    negatives = "none"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 4096,
        proj_output_dim: int = 256,
        pred_hidden_dim: int | None = None,
        base_momentum: float = 0.99,
        final_momentum: float = 1.0,
    ):
        super().__init__(features_dim, base_momentum, final_momentum)
        if pred_hidden_dim is None:
            pred_hidden_dim = proj_hidden_dim
        check(pred_hidden_dim >= 1, "method_kwargs.task_kwargs.pred_hidden_dim", ">= 1", pred_hidden_dim)
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)
        self.predictor = projection_head(proj_output_dim, pred_hidden_dim, proj_output_dim)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        positives = targets if positives is None else positives
        return mean_over_pairs(byol_loss, [self.predictor(z) for z in projections], positives)
