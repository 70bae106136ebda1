"""SimSiam: predict the same head's projection of another view, under a stop-gradient."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.pairs import mean_over_pairs, negative_cosine_loss
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.modules.stop_gradient import without_gradient
from metamask_plugin.tasks.base import Projections, Task


class SimSiam(Task):
    """Eq. (4) of [0] over all ordered pairs of views.

        mean over j != k of   D(q(z_j), stopgrad(z_k)),   D(p, z) = -cos(p, z)

    With two views it is Eq. (4); more are not in [0]. The predictor sees the unweighted projections alone.
    Images do not meet in the loss, but in the heads' BatchNorm, which wants two of them in training mode.

    The BatchNorm on the projection has scale and shift, which [0] does not exclude and its release [1] omits.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layers.
        proj_output_dim: P, the projection's dimension.
        pred_hidden_dim: width of the predictor's hidden layer; None: a quarter of P, as [0] has 512 of 2,048.
        proj_layers: of the head.

    [0] Chen and He, *Exploring Simple Siamese Representation Learning*, CVPR 2021.
    [1] https://github.com/facebookresearch/simsiam

    Example:
        >>> task = SimSiam(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Chen and He, CVPR 2021"
    negatives = "none"
    stop_gradient = True

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 2048,
        pred_hidden_dim: int | None = None,
        proj_layers: int = 3,
    ):
        super().__init__(features_dim)
        if pred_hidden_dim is None:
            pred_hidden_dim = max(1, proj_output_dim // 4)
        check(pred_hidden_dim >= 1, "method_kwargs.task_kwargs.pred_hidden_dim", ">= 1", pred_hidden_dim)
        check(proj_layers >= 1, "method_kwargs.task_kwargs.proj_layers", ">= 1", proj_layers)
        self.projection_dim = proj_output_dim
        self.projector = projection_head(
            features_dim, proj_hidden_dim, proj_output_dim, proj_layers, final_norm=True
        )
        self.predictor = projection_head(proj_output_dim, pred_hidden_dim, proj_output_dim)

    def project_key(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """The same head, without gradient to its weights."""
        return without_gradient(self.projector, feats)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        # other positives come without a gradient but to A: from detached features, through project_key
        positives = [z.detach() for z in projections] if positives is None else positives
        return mean_over_pairs(negative_cosine_loss, [self.predictor(z) for z in projections], positives)
