"""NNCLR: the nearest neighbour of one view has to find the other view."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.nnclr import nearest_neighbours, nnclr_loss
from metamask_plugin.modules.batch_norm import frozen_bn_stats
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import Projections, Task


class NNCLR(Task):
    """Nearest-neighbour contrastive learning of representations [0].

    A view's anchor is not its own projection z but the nearest entry of a support set of past projections,
    which lets no gradient through; positive and negatives are predictions p of the other view. The support
    set takes in the first view of each batch.

    Under ICL-MSR the weighted projections go through the predictor as well, each stratum as a batch of its
    own for BatchNorm; anchors and negatives are not weighted.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the projection head's two hidden layers; BatchNorm follows all three.
        proj_output_dim: P, the dimension of z and p.
        pred_hidden_dim: width of the predictor's hidden layer.
        temperature: tau; 0.1 is that of solo-learn's loss.
        queue_size: K, size of the support set; 65,536 is solo-learn's.
        bank_size: K past predictions as further negatives; [0] has none.

    [0] Dwibedi et al., *With a Little Help from My Friends*, ICCV 2021.

    Example:
        >>> task = NNCLR(8, proj_hidden_dim=16, proj_output_dim=4, queue_size=32)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Dwibedi et al., ICCV 2021"
    negatives = "the batch, predicted, memory bank optional"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 256,
        pred_hidden_dim: int = 4096,
        temperature: float = 0.1,
        queue_size: int = 65536,
        bank_size: int = 0,
    ):
        super().__init__(features_dim)
        name = "method_kwargs.task_kwargs"
        check(temperature > 0, f"{name}.temperature", "> 0", temperature)
        check(pred_hidden_dim >= 1, f"{name}.pred_hidden_dim", ">= 1", pred_hidden_dim)
        whole = isinstance(queue_size, int) and queue_size >= 1
        check(whole, f"{name}.queue_size", "an integer >= 1", queue_size)
        self.temperature = temperature
        self.projection_dim = proj_output_dim
        self.projector = projection_head(
            features_dim, proj_hidden_dim, proj_output_dim, layers=3, final_norm=True
        )
        self.predictor = projection_head(proj_output_dim, pred_hidden_dim, proj_output_dim)
        self.support = FeatureQueue(queue_size, proj_output_dim, f"{name}.queue_size")
        self.bank = FeatureQueue(bank_size, proj_output_dim, negatives=True)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        if positives is not None:
            positives = [self._predict_strata(view) for view in positives]
        neighbours = [nearest_neighbours(z, self.support.entries) for z in projections]
        predictions = [self.predictor(z) for z in projections]
        return nnclr_loss(neighbours, predictions, self.temperature, positives, self.bank.entries)

    def _predict_strata(self, view: torch.Tensor) -> torch.Tensor:
        if view.dim() == 2:
            return self.predictor(view)
        return torch.stack([self.predictor(stratum) for stratum in view.unbind(1)], dim=1)

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        self.support.push(projections[0])
        if len(self.bank) > 0:
            with frozen_bn_stats(self.predictor):  # the loss has counted the batch
                # the step's autocast is over: in the precision of the weights
                dtype = self.bank.entries.dtype
                self.bank.push(torch.cat([self.predictor(z.to(dtype)) for z in projections]))
