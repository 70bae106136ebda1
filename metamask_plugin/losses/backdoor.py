"""ICL-MSR's backdoor-adjusted loss: the positive is seen once through each semantic stratum."""

from collections.abc import Sequence

import torch

from metamask_plugin.losses.contrastive import NegativeMass, multi_view_loss, summed


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
    here keeps lambda independent of the batch size, as in the contrastive loss beside it. For other
    tasks, see the argument ``positives`` of their losses.

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

    Example:
        >>> views = [torch.eye(3), torch.eye(3)]
        >>> strata = [z[:, None].expand(3, 4, 3) for z in views]  # n = 4, all weights 1
        >>> loss = backdoor_adjusted_loss(views, strata, temperature=1.0)
        >>> round(loss.item(), 3)  # -log e / (e + 4)
        0.905

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    if len(weighted) != len(views) or any(strata.dim() != 3 for strata in weighted):
        raise ValueError(
            "backdoor_adjusted_loss: weighted must be as many tensors (N, n, P) as there are views, got "
            f"{[tuple(z.shape) for z in views]} and {[tuple(strata.shape) for strata in weighted]}"
        )
    return multi_view_loss(views, weighted, temperature, bank, negative_mass)
