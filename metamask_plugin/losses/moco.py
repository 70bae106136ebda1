"""The contrastive loss of MoCo: queries against keys, and a queue of past keys as negatives."""

from collections.abc import Sequence

import torch

from metamask_plugin.losses.contrastive import contrastive_loss
from metamask_plugin.losses.pairs import ordered_pairs


def moco_loss(
    queries: Sequence[torch.Tensor],
    keys: Sequence[torch.Tensor],
    queue: torch.Tensor,
    temperature: float = 0.2,
) -> torch.Tensor:
    """InfoNCE with negatives from the queue alone, Eq. (1) of [0], averaged over pairs of views.

        -log e(q_j, k+) / ( e(q_j, k+) + sum over the queue e(q_j, k-) ),    e(u, v) = exp(cosine / tau)

    for every ordered pair of a query's view j and a key's view k != j. Keys of the batch's other images
    are no negatives, so a batch of one image is one like any other.

    Args:
        queries: the online network's projections of M >= 2 views, each of shape (N, P).
        keys: the target network's of the first 1 to M of them, each of shape (N, P), or (N, n, P) for n
            strata, over which the likelihood is averaged (ICL-MSR). Nothing needs to be normalised.
        queue: past keys, shape (K, P), K >= 1.
        temperature: tau > 0.

    Returns:
        The mean over anchors and pairs, a scalar.

    Raises:
        ValueError: for fewer than two queries, no keys or more than queries, shapes that do not fit, an
            empty queue, or tau <= 0.

    Example:
        >>> z, queue = torch.eye(4)[:2], torch.eye(4)[2:]
        >>> round(moco_loss([z, z], [z, z], queue, temperature=1.0).item(), 3)  # -log e / (e + 2)
        0.551

    [0] He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020.
    """
    pairs = ordered_pairs(queries, keys, "moco_loss: queries, keys")
    return torch.stack([contrastive_loss(query, key, queue, temperature) for query, key in pairs]).mean()
