"""The two-view contrastive loss of CMC, whose negatives are of the other view only."""

from collections.abc import Sequence

import torch

from metamask_plugin.losses.contrastive import contrastive_loss, same_image


def cmc_loss(
    views: Sequence[torch.Tensor],
    temperature: float = 0.07,
    banks: Sequence[torch.Tensor] | None = None,
    positives: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """L(V1, V2) = L^{V1,V2} + L^{V2,V1}, the two-view objective of [0] (its Section 3.2).

    In L^{V1,V2} the anchor is z_i of view 1, the positive z_i of view 2, and the negatives are what there
    is of view 2 alone: the batch's other images and view 2's bank.

        L^{V1,V2} = mean over i of  -log e(z_i^1, z_i^2) / ( e(z_i^1, z_i^2) + sum_neg e(z_i^1, z^2) )

    with e(u, v) = exp(cosine(u, v) / tau). The original approximates this softmax by noise-contrastive
    estimation over a bank with one entry an image; here it is computed as it stands (InfoNCE).

    Args:
        views: z of view 1 and of view 2, each of shape (N, P); they need not be normalised.
        temperature: tau > 0.
        banks: past projections of view 1 and of view 2, each of shape (K, P).
        positives: what takes the views' place as positives, each of shape (N, P), or (N, n, P) for n
            strata, over which the likelihood is averaged (ICL-MSR).

    Returns:
        The sum of the two directions, each a mean over its N anchors: a scalar.

    Raises:
        ValueError: for any number of views, banks or positives but two, shapes that do not fit, tau <= 0,
            or a batch of one image without a bank: it has no negatives.

    Example:
        >>> views = [torch.eye(3), torch.eye(3)]
        >>> round(cmc_loss(views, temperature=1.0).item(), 3)  # twice -log e / (e + 2)
        1.103

    [0] Tian et al., *Contrastive Multiview Coding*, ECCV 2020.
    """
    if len(views) != 2 or views[0].shape != views[1].shape or views[0].dim() != 2:
        raise ValueError(
            f"cmc_loss: views must be two tensors of one shape (N, P), got {[tuple(z.shape) for z in views]}"
        )
    for name, given in (("banks", banks), ("positives", positives)):
        if given is not None and len(given) != 2:
            raise ValueError(f"cmc_loss: {name} must be two, one a view, got {len(given)}")
    images = len(views[0])
    positives = views if positives is None else positives
    directions = []
    for anchor, other in ((0, 1), (1, 0)):
        candidates = views[other] if banks is None else torch.cat([views[other], banks[other]])
        own = same_image(images, 1, len(candidates) - images, device=candidates.device)
        directions.append(contrastive_loss(views[anchor], positives[other], candidates, temperature, own))
    return torch.stack(directions).sum()
