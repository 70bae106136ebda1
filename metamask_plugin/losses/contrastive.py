"""The contrastive term that most tasks share: one positive or, for ICL-MSR, several strata of it."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from metamask_plugin.losses.pairs import ordered_pairs

NegativeMass = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(positive logits (N, n), negative logits (N, K), -inf where there is none) to the log of what stands for
the negatives in the denominator, (N, n) or (N, 1)."""


def summed(positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
    """The plain denominator: the log of the summed exponentials of the negatives, (N, 1)."""
    return negatives.logsumexp(dim=1, keepdim=True)


def contrastive_loss(
    anchors: torch.Tensor,
    positives: torch.Tensor,
    negatives: torch.Tensor,
    temperature: float = 0.5,
    excluded: torch.Tensor | None = None,
    negative_mass: NegativeMass = summed,
) -> torch.Tensor:
    """Minus the log likelihood of each anchor's positive, averaged over its strata and then the anchors.

        mean over anchors of   -log 1/n sum_t  e(z, z+_t) / ( e(z, z+_t) + sum_neg e(z, z-) )

    with e(u, v) = exp(cosine(u, v) / tau).

    With one positive an anchor this is InfoNCE [1]; with n strata of it, ICL-MSR's Eqs. (3), (4), (6) [0].

    Args:
        anchors: z, shape (N, P). Nothing needs to be normalised.
        positives: z+, shape (N, P), or its strata, (N, n, P).
        negatives: candidates shared by all anchors, shape (K, P).
        temperature: tau > 0.
        excluded: bool, shape (N, K), true where a candidate is no negative of an anchor.
        negative_mass: what the negatives amount to, see :data:`NegativeMass`; the sum by default.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, tau <= 0, or an anchor without any negative.

    Example:
        >>> z = torch.eye(3)
        >>> loss = contrastive_loss(z, z, z, temperature=1.0, excluded=z.bool())
        >>> round(loss.item(), 3)  # -log e / (e + 2)
        0.551

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    [1] van den Oord et al., *Representation Learning with Contrastive Predictive Coding*, 2018.
    """
    strata = positives if positives.dim() == 3 else positives[:, None]
    dims = {anchors.shape[-1], strata.shape[-1], negatives.shape[-1]}
    if anchors.dim() != 2 or negatives.dim() != 2 or len(strata) != len(anchors) or len(dims) != 1:
        raise ValueError(
            "contrastive_loss: anchors must be (N, P), positives (N, P) or (N, n, P), negatives (K, P), got "
            f"{tuple(anchors.shape)}, {tuple(positives.shape)} and {tuple(negatives.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"contrastive_loss: temperature must be > 0, got {temperature}")
    # on a GPU, same_image has caught what would be found
    alone = excluded is not None and can_be_asked(excluded) and bool(excluded.all(dim=1).any())
    if len(negatives) == 0 or alone:
        raise ValueError(
            "contrastive_loss: every anchor needs a negative, got one without: a batch of one image?"
        )

    anchors = F.normalize(anchors, dim=-1)
    positive_logits = torch.einsum("np,ntp->nt", anchors, F.normalize(strata, dim=-1)) / temperature
    negative_logits = anchors @ F.normalize(negatives, dim=-1).T / temperature
    if excluded is not None:
        negative_logits = negative_logits.masked_fill(excluded, float("-inf"))
    mass = negative_mass(positive_logits, negative_logits)
    # log e+ / (e+ + mass); unlike logaddexp's, softplus's second derivative stays finite at small tau
    log_p = -F.softplus(mass - positive_logits, threshold=40)
    return (math.log(log_p.shape[1]) - log_p.logsumexp(dim=1)).mean()


def multi_view_loss(
    views: Sequence[torch.Tensor],
    positives: Sequence[torch.Tensor],
    temperature: float = 0.5,
    bank: torch.Tensor | None = None,
    negative_mass: NegativeMass = summed,
) -> torch.Tensor:
    """:func:`contrastive_loss` averaged over ordered pairs of views; negatives are of all views.

    Args:
        views: M >= 2 projections, each of shape (N, P): anchors, and those of the *other* images negatives.
        positives: of the same views, each of shape (N, P), or (N, n, P) for n strata.
        temperature: tau > 0.
        bank: further negatives, shape (K, P).
        negative_mass: what the negatives amount to; the sum by default.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, a batch of one image, or tau <= 0.

    Example:
        >>> views = [torch.eye(3), torch.eye(3)]
        >>> multi_view_loss(views, views, temperature=0.1) < 1e-3
        tensor(True)
    """
    pairs = ordered_pairs(views, positives, "multi_view_loss: views, positives")
    images = len(views[0])
    if images < 2:
        raise ValueError("multi_view_loss: views must hold 2 images or more, got 1: no negatives")
    candidates = torch.cat([*views, *([] if bank is None else [bank])])
    own = same_image(images, len(views), len(candidates) - images * len(views), device=candidates.device)
    return torch.stack(
        [contrastive_loss(z, p, candidates, temperature, own, negative_mass) for z, p in pairs]
    ).mean()


def can_be_asked(answer: torch.Tensor | None) -> bool:
    """Whether a look at a tensor's values is free; on a GPU it would make every step wait."""
    return answer is not None and answer.device.type == "cpu"


def same_image(images: int, views: int, bank: int = 0, device: torch.device | None = None) -> torch.Tensor:
    """Which of (views * images + bank) candidates show an anchor's own image: bool, (images, that many).

    Candidates come view by view, then a bank's entries, none of which counts as an anchor's own.

    Raises:
        ValueError: for one image without a bank, which has no negative.
    """
    if images == 1 and bank == 0:
        raise ValueError("same_image: every anchor needs a negative, got a batch of one image without a bank")
    own = torch.eye(images, dtype=torch.bool, device=device).repeat(1, views)
    return F.pad(own, (0, bank))
