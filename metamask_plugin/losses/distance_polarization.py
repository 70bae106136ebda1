"""Large-margin contrastive learning's regulariser: no pair of projections half near, half far."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def distance_polarization(
    views: Sequence[torch.Tensor], delta_plus: float = 0.2, delta_minus: float = 0.5
) -> torch.Tensor:
    """R of [0]: pushes pairwise distances out of the margin between delta+ and delta-.

        R = mean over pairs of  | min( (D - delta+) (D - delta-), 0 ) |,     D = (1 - cosine) / 2

    A pair in the lower half of the margin is drawn together, one in the upper half pushed apart, and outside
    of it there is no gradient. Pairs are those of all projections of all views, two views of one image
    among them: R does not know which pair is which. The second derivative exists but at the two edges.

    R is the l1 norm of that minimum over the matrix of distances in [0, 1]. This D, the defaults (cosines
    between 0.6 and 0) and the mean, which keeps R independent of the batch size, are chosen here. A
    projection's distance to itself is 0, which adds nothing.

    Args:
        views: one or more projections, each of shape (N, P); they need not be normalised.
        delta_plus: below this distance a pair is near.
        delta_minus: above this one it is far; 0 <= delta+ < delta- <= 1.

    Returns:
        A scalar between 0 and (delta- - delta+)^2 / 4.

    Raises:
        ValueError: for views of different shape, a single projection in all, or margins that do not fit.

    [0] Chen et al., *Large-Margin Contrastive Learning with Distance Polarization Regularizer*, ICML 2021.
    """
    fits = len(views) >= 1 and len({view.shape for view in views}) == 1 and views[0].dim() == 2
    if not fits or len(views) * len(views[0]) < 2:
        raise ValueError(
            "distance_polarization: views must be tensors of one shape (N, P) with two rows or more in all, "
            f"got {[tuple(view.shape) for view in views]}"
        )
    if not 0 <= delta_plus < delta_minus <= 1:
        raise ValueError(
            "distance_polarization: delta_plus and delta_minus must be 0 <= delta_plus < delta_minus <= 1, "
            f"got {delta_plus} and {delta_minus}"
        )
    z = F.normalize(torch.cat(list(views)), dim=1)
    distances = (1 - z @ z.T) / 2
    within = F.relu((distances - delta_plus) * (delta_minus - distances))
    return within.sum() / (len(z) * (len(z) - 1))
