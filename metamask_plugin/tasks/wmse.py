"""W-MSE: views of an image meet in whitened projections."""

import torch
import torch.distributed as dist

from metamask_plugin.errors import check
from metamask_plugin.losses.pairs import mean_over_pairs
from metamask_plugin.losses.whitening import random_slices, whitened_mse_loss
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import Projections, Task


class WMSE(Task):
    """The distance between whitened views, Section 3 of [0]; settings of the authors' code [1].

    A batch of more than ``whitening_size`` images is whitened in random slices, drawn from torch's random
    state: the same in every evaluation of a meta step, which all start from the same state, and in every
    process, which all have the joint batch before them.

    ICL-MSR's form is the mean of the loss over strata of the weighted view, whitened on their own like the
    views, and in the same slices.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P; 64 for CIFAR, 128 elsewhere in [1]. Half the whitening size or less: see
            :func:`~metamask_plugin.losses.whitening.whiten` on batches of P images or fewer.
        whitening_size: images whitened together; [1] takes 2P. Of a batch that is no multiple of it the
            slices get larger, of a smaller batch all images are one slice.
        whitening_iterations: number of random partitions to average over; [1] takes 4 with P = 128 and two
            views.
        eps: share of the identity in the covariance. [1] takes 0, which fails with P images or fewer; 1e-3
            is chosen here.

    [0] Ermolov et al., *Whitening for Self-Supervised Representation Learning*, ICML 2021.
    [1] https://github.com/htdt/self-supervised

    Example:
        >>> task = WMSE(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> out = task([torch.randn(16, 8), torch.randn(16, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([16, 4]))
    """

    source = "Ermolov et al., ICML 2021"
    negatives = "none (whitening)"
    capturable = False  # slices are drawn

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 1024,
        proj_output_dim: int = 64,
        whitening_size: int = 128,
        whitening_iterations: int = 1,
        eps: float = 1e-3,
    ):
        super().__init__(features_dim)
        name = "method_kwargs.task_kwargs"
        check(whitening_size >= 2, f"{name}.whitening_size", ">= 2", whitening_size)
        check(whitening_iterations >= 1, f"{name}.whitening_iterations", ">= 1", whitening_iterations)
        check(0 <= eps < 1, f"{name}.eps", "in [0, 1)", eps)
        self.whitening_size, self.whitening_iterations, self.eps = whitening_size, whitening_iterations, eps
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        partitions = self._partitions(projections[0])
        if positives is None:
            return whitened_mse_loss(projections, partitions, self.eps)
        return mean_over_pairs(
            lambda anchor, positive: whitened_mse_loss([anchor, positive], partitions, self.eps),
            projections,
            positives,
        )

    def _partitions(self, view: torch.Tensor) -> list[list[torch.Tensor]]:
        def draw() -> list[list[torch.Tensor]]:
            return random_slices(len(view), self.whitening_size, self.whitening_iterations, view.device)

        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return draw()
        seed = torch.randint(2**62, (1,), device=view.device)
        dist.broadcast(seed, src=0)
        with torch.random.fork_rng(devices=[view.device] if view.is_cuda else []):
            torch.manual_seed(int(seed))
            return draw()
