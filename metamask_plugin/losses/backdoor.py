"""ICL-MSR's backdoor-adjusted losses: the positive is seen once through each semantic stratum."""

from collections.abc import Callable, Sequence
from itertools import permutations

import torch

from metamask_plugin.losses.contrastive import NegativeMass, contrastive_loss, same_image, summed


def backdoor_adjusted_loss(
    views: Sequence[torch.Tensor],
    weighted: Sequence[torch.Tensor],
    temperature: float = 0.5,
    bank: torch.Tensor | None = None,
    negative_mass: NegativeMass = summed,
) -> torch.Tensor:
    """L_msr, Eqs. (3), (4) and (6) of [0]: the likelihood of the positive, averaged over the strata.

        P(Y | do(X)) = 1/n sum_t  e(z, z+_t) / ( e(z, z+_t) + sum_neg e(z, z-) ),   e = exp(cosine / tau)
        L_msr = mean over anchors of -log P(Y | do(X))

    z+_t is the positive whose channels were weighted by a_t. Negatives are the unweighted projections of
    all views of the *other* images. The text of Eqs. (3) and (4) lost the exponentials; with one stratum
    of ones and two views this is :func:`~metamask_plugin.losses.nt_xent_loss`. Eq. (6) sums; the mean
    here keeps lambda independent of the batch size, as in the contrastive loss beside it.

    Args:
        views: M >= 2 projections, each of shape (N, P); they need not be normalised.
        weighted: the same views' projections with weighted channels, each of shape (N, n, P).
        temperature: tau > 0.
        bank: further negatives, shape (K, P).
        negative_mass: what the negatives amount to; the sum, if not given.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, a batch of one image, or tau <= 0.

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    _check_shapes("backdoor_adjusted_loss", views, weighted)
    images = len(views[0])
    if images < 2:
        raise ValueError("backdoor_adjusted_loss: views must hold 2 images or more, got 1: no negatives")
    candidates = torch.cat([*views, *([] if bank is None else [bank])])
    own = same_image(images, len(views), len(candidates) - images * len(views), device=candidates.device)
    return torch.stack(
        [
            contrastive_loss(views[anchor], weighted[positive], candidates, temperature, own, negative_mass)
            for anchor, positive in permutations(range(len(views)), 2)
        ]
    ).mean()


def stratified_loss(
    pair_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    views: Sequence[torch.Tensor],
    weighted: Sequence[torch.Tensor],
) -> torch.Tensor:
    """L_msr for a task without negatives: its own loss on the weighted positives, averaged over strata.

    Not in the paper, which adds its regulariser to BYOL and ReSSL and gives a formula for contrastive
    losses only [0]. Without negatives there is no probability to average; the loss takes its place:

        L_msr = mean over t and ordered pairs of views (j, k) of pair_loss(z_j, z_k,t),   k != j

    With a target network the positives are its projections of the large crops alone: there may be fewer of
    them than views.

    Args:
        pair_loss: from an anchor (N, P) and a positive (N, P) to a scalar.
        views: M >= 2 anchors, each of shape (N, P).
        weighted: the positives with weighted channels, of the first K of the views, 1 <= K <= M, each of
            shape (N, n, P).

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit.

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    _check_shapes("stratified_loss", views, weighted, all_weighted=False)
    return torch.stack(
        [
            pair_loss(views[anchor], stratum)
            for anchor, positive in permutations(range(len(views)), 2)
            if positive < len(weighted)
            for stratum in weighted[positive].unbind(1)
        ]
    ).mean()


def _check_shapes(
    name: str, views: Sequence[torch.Tensor], weighted: Sequence[torch.Tensor], all_weighted: bool = True
) -> None:
    fits = (
        len(views) >= 2
        and (len(weighted) == len(views) if all_weighted else 1 <= len(weighted) <= len(views))
        and views[0].dim() == 2
        and len({view.shape for view in views}) == 1
        and len({view.shape for view in weighted}) == 1
        and weighted[0].dim() == 3
        and (len(weighted[0]), weighted[0].shape[2]) == tuple(views[0].shape)
    )
    if not fits:
        raise ValueError(
            f"{name}: views must be two or more tensors of one shape (N, P), weighted "
            f"{'' if all_weighted else 'at most '}as many of (N, n, P), "
            f"got {[tuple(view.shape) for view in views]} and {[tuple(view.shape) for view in weighted]}"
        )
