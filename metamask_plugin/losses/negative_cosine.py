"""How far a prediction points away from its target: the loss of SimSiam and, but for a factor, of BYOL."""

import torch
import torch.nn.functional as F


def negative_cosine_loss(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Minus the cosine of prediction and target, averaged over the batch: D of Eq. (1) in [0].

    Between -1 (same direction) and 1. Gradients go to both arguments: a stop-gradient is the caller's.

    Args:
        p: predictions, shape (N, P), N >= 1; neither argument needs to be normalised.
        z: targets, shape (N, P).

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, or no image at all.

    [0] Chen and He, *Exploring Simple Siamese Representation Learning*, CVPR 2021.
    """
    if p.dim() != 2 or p.shape != z.shape or len(p) == 0:
        raise ValueError(
            "negative_cosine_loss: p and z must be of one shape (N, P), N >= 1, got "
            f"{tuple(p.shape)} and {tuple(z.shape)}"
        )
    return -(F.normalize(p, dim=1) * F.normalize(z, dim=1)).sum(dim=1).mean()


def byol_loss(p: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """Squared distance of the normalised prediction and target, averaged over the batch: Eq. (2) of [0].

        |p / |p| - z / |z||^2 = 2 - 2 cos(p, z)

    So it is 2 + 2 D with D the :func:`negative_cosine_loss`, which see: between 0 and 4.

    [0] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.
    """
    return 2 + 2 * negative_cosine_loss(p, z)
