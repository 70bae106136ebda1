"""Losses of two views at a time: a prediction and its target, averaged over pairs of views."""

from collections.abc import Callable, Sequence
from itertools import permutations

import torch
import torch.nn.functional as F


def mean_over_pairs(
    pair_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    views: Sequence[torch.Tensor],
    positives: Sequence[torch.Tensor],
) -> torch.Tensor:
    """The mean of a loss over ordered pairs of an anchor's view and another view's positive.

        mean over j != k of   pair_loss(z_j, z+_k)

    With n strata of each positive, as ICL-MSR [0] has them, also the mean over these. Not in the paper, which
    adds its regulariser to BYOL and ReSSL and gives a formula for contrastive losses only: without negatives
    there is no likelihood to average, and the loss takes its place.

    Args:
        pair_loss: from an anchor (N, P) and a positive (N, P) to a scalar.
        views: M >= 2 anchors, each of shape (N, P).
        positives: of the first K of the views, 1 <= K <= M, each of shape (N, P), or (N, n, P) for n strata.
            With a target network they are its projections of the large crops, so K may be below M.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit.

    Example:
        >>> views = [torch.eye(2), torch.eye(2)]
        >>> mean_over_pairs(byol_loss, views, [z.flip(0) for z in views])
        tensor(2.)

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    pairs = ordered_pairs(views, positives)
    strata = [(z, stratum) for z, p in pairs for stratum in (p.unbind(1) if p.dim() == 3 else [p])]
    return torch.stack([pair_loss(z, stratum) for z, stratum in strata]).mean()


def ordered_pairs(
    views: Sequence[torch.Tensor],
    positives: Sequence[torch.Tensor],
    names: str = "mean_over_pairs: views, positives",
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Each anchor with each positive of another view.

    Args:
        views: as for :func:`mean_over_pairs`, and so are ``positives`` and errors.
        positives: likewise.
        names: of the function and both arguments, for messages.
    """
    fits = (
        len(views) >= 2
        and 1 <= len(positives) <= len(views)
        and views[0].dim() == 2
        and len({z.shape for z in views}) == len({z.shape for z in positives}) == 1
        and positives[0].dim() in (2, 3)
        and (len(positives[0]), positives[0].shape[-1]) == tuple(views[0].shape)
    )
    if not fits:
        first, second = names.split(", ")
        raise ValueError(
            f"{first} must be two or more tensors of one shape (N, P), {second} at most as many of (N, P) or "
            f"(N, n, P), got {[tuple(z.shape) for z in views]} and {[tuple(z.shape) for z in positives]}"
        )
    pairs = permutations(range(len(views)), 2)
    return [(views[j], positives[k]) for j, k in pairs if k < len(positives)]


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

    Example:
        >>> z = torch.eye(3)
        >>> negative_cosine_loss(z, z)
        tensor(-1.)

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

    Example:
        >>> byol_loss(torch.eye(3), -torch.eye(3))
        tensor(4.)

    [0] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.
    """
    return 2 + 2 * negative_cosine_loss(p, z)
