"""The loss of NNCLR: a view's nearest neighbour among past projections has to find the other view."""

from collections.abc import Sequence
from itertools import permutations

import torch
import torch.nn.functional as F

from metamask_plugin.losses.contrastive import contrastive_loss, same_image


@torch.no_grad()
def nearest_neighbours(projections: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """NN(z, Q): of each projection, the entry of the support set with the largest cosine.

    Of unit vectors that is the one with the smallest distance, as [0] writes it. There is no gradient.

    Args:
        projections: z, shape (N, P).
        support: Q, shape (K, P), K >= 1.

    Returns:
        Rows of ``support``, shape (N, P).

    Raises:
        ValueError: for shapes that do not fit, or an empty support set.

    [0] Dwibedi et al., *With a Little Help from My Friends*, ICCV 2021.
    """
    fits = projections.dim() == support.dim() == 2 and projections.shape[1] == support.shape[1]
    if not fits or len(support) == 0:
        raise ValueError(
            "nearest_neighbours: projections must be (N, P), support (K, P) with K >= 1, got "
            f"{tuple(projections.shape)} and {tuple(support.shape)}"
        )
    return support[(projections @ F.normalize(support, dim=1).T).argmax(dim=1)]


def nnclr_loss(
    neighbours: Sequence[torch.Tensor],
    predictions: Sequence[torch.Tensor],
    temperature: float = 0.1,
    positives: Sequence[torch.Tensor] | None = None,
    bank: torch.Tensor | None = None,
) -> torch.Tensor:
    """L_NNCLR of [0] with a predictor: InfoNCE within a batch, averaged over ordered pairs of views.

        -log e(NN(z_i^j, Q), p_i^k) / sum_i' e(NN(z_i^j, Q), p_i'^k),    e(u, v) = exp(cosine / tau)

    for anchor view j and positive view k != j. The negatives are the same view k of the other images.

    Args:
        neighbours: NN(z, Q) of M >= 2 views, each of shape (N, P).
        predictions: p of the same views, each of shape (N, P). Nothing needs to be normalised.
        temperature: tau > 0.
        positives: what takes the predictions' place as positives, each of shape (N, P), or (N, n, P) for n
            strata, over which the likelihood is averaged (ICL-MSR). The negatives stay ``predictions``.
        bank: past predictions as further negatives, shape (K, P).

    Returns:
        The mean over anchors and pairs, a scalar.

    Raises:
        ValueError: for fewer than two views, shapes that do not fit, tau <= 0, or a batch of one image:
            it has no negatives.

    Example:
        >>> neighbours, predictions = [torch.eye(3), torch.eye(3)], [torch.eye(3), torch.eye(3)]
        >>> loss = nnclr_loss(neighbours, predictions, temperature=1.0)
        >>> round(loss.item(), 3)  # -log e / (e + 2)
        0.551

    [0] Dwibedi et al., *With a Little Help from My Friends*, ICCV 2021.
    """
    positives = predictions if positives is None else positives
    if len(neighbours) < 2 or not len(neighbours) == len(predictions) == len(positives):
        raise ValueError(
            "nnclr_loss: neighbours, predictions and positives must be of the same two or more views, got "
            f"{len(neighbours)}, {len(predictions)} and {len(positives)}"
        )
    bank = predictions[0][:0] if bank is None else bank
    own = same_image(len(predictions[0]), 1, len(bank), device=predictions[0].device)
    return torch.stack(
        [
            contrastive_loss(neighbours[j], positives[k], torch.cat([predictions[k], bank]), temperature, own)
            for j, k in permutations(range(len(neighbours)), 2)
        ]
    ).mean()
