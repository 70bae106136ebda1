"""What the weight vectors of ICL-MSR's ``f_msr`` point at, in numbers."""

import math

import torch
import torch.nn.functional as F

from metamask_plugin.errors import check


def weighted_maps(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Heat maps ``relu(sum over c of a[t, c] * map[c])``, one for each weight vector ``t``.

    Args:
        maps: the encoder's last feature maps, shape (B, C, h, w).
        weights: ``A`` of the same images, shape (B, n, C).

    Returns:
        Shape (B, n, h, w).

    Raises:
        UserError: for shapes that do not fit.
    """
    _check_weights(weights)
    fits = maps.ndim == 4 and maps.shape[:2] == weights.shape[::2]
    check(fits, "feature maps", f"of shape ({len(weights)}, {weights.shape[2]}, h, w)", tuple(maps.shape))
    return torch.einsum("bnc,bchw->bnhw", weights, maps).relu()


def mean_gram(weights: torch.Tensor) -> torch.Tensor:
    """Cosine of every two weight vectors of an image, averaged over the images.

    Args:
        weights: ``A``, shape (B, n, C), at any scale.

    Returns:
        Shape (n, n), with 1 on the diagonal (0 for vectors that are 0).

    Raises:
        UserError: for another shape, or no images.
    """
    _check_weights(weights)
    unit = F.normalize(weights, dim=2)
    return (unit @ unit.transpose(1, 2)).mean(dim=0)


def mean_off_diagonal(gram: torch.Tensor) -> float:
    """Mean cosine of two different vectors, from a matrix (n, n); NaN when there is one vector."""
    n = len(gram)
    if n < 2:
        return math.nan
    return float(gram.sum() - gram.diagonal().sum()) / (n * (n - 1))


def _check_weights(weights: torch.Tensor) -> None:
    fits = weights.ndim == 3 and min(weights.shape) > 0
    check(fits, "semantic weights", "of shape (B, n, C), one or more of each", tuple(weights.shape))
