"""Instance discrimination whose likelihoods may not depend on the augmentations: RELIC."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from metamask_plugin.losses.contrastive import contrastive_loss, same_image
from metamask_plugin.losses.pairs import ordered_pairs


def relic_loss(
    projections: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    temperature: float = 0.2,
    alpha: float = 1.0,
    bank: torch.Tensor | None = None,
    weighted: Sequence[torch.Tensor] | None = None,
) -> torch.Tensor:
    """Eq. (3) of [0]: cross-entropy of the likelihoods, and the divergence between them.

    For anchors z of view j and targets h of view k, image i is taken for image m with the likelihood

        p^{jk}(m | i)  proportional to  exp( cosine(z_i^j, h_m^k) / tau )

    over the targets of view k of all images, and the bank's entries. With the means over all pairs (j, k),
    k != j, the loss is

        mean of -log p^{jk}(i | i)   +   alpha  mean over ordered pairs of pairs of  KL( p^{jk} || p^{qt} )

    For two views the divergence is that between p^{12} and p^{21}, both ways round. Eq. (3) sums over
    images and augmentations; the means keep the value independent of the batch size and of the number of
    views. No likelihood is detached in the divergence, as none is in Eq. (3). A single pair (two views, one
    target) has nothing to be compared with: its divergence is 0.

    Args:
        projections: z of M >= 2 views, each of shape (N, P). Nothing needs to be normalised.
        targets: h of the first T views, 1 <= T <= M, each of shape (N, P).
        temperature: tau > 0.
        alpha: weight of the divergence, >= 0.
        bank: further targets, of other images than these, shape (K, P).
        weighted: the positives h_i^k of ICL-MSR's L_msr, for each target its strata, (N, n, P): the
            likelihood is averaged over them, inside the logarithm. Negatives and divergence take
            ``targets`` all the same.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, tau <= 0, alpha < 0, or one image and no bank.

    Example:
        >>> views = [torch.eye(3), torch.eye(3)]
        >>> loss = relic_loss(views, views, temperature=1.0)
        >>> round(loss.item(), 3)  # -log e / (e + 2), divergence 0
        0.551

    [0] Mitrovic et al., *Representation Learning via Invariant Causal Mechanisms*, ICLR 2021.
    """
    pairs = ordered_pairs(projections, targets, "relic_loss: projections, targets")
    weighted = targets if weighted is None else weighted
    positives = ordered_pairs(projections, weighted, "relic_loss: projections, weighted")
    bank = targets[0][:0] if bank is None else bank
    if len(weighted) != len(targets):
        raise ValueError(f"relic_loss: weighted must be one a target, got {len(weighted)} of {len(targets)}")
    if bank.dim() != 2 or bank.shape[1] != targets[0].shape[1]:
        raise ValueError(f"relic_loss: bank must be (K, {targets[0].shape[1]}), got {tuple(bank.shape)}")
    if not alpha >= 0:
        raise ValueError(f"relic_loss: alpha must be >= 0, got {alpha}")
    own = same_image(len(targets[0]), 1, len(bank), device=targets[0].device)
    contrasts, log_likelihoods = [], []
    for (anchors, of_view), (_, positive) in zip(pairs, positives):
        candidates = torch.cat([of_view, bank])
        contrasts.append(contrastive_loss(anchors, positive, candidates, temperature, own))
        logits = F.normalize(anchors, dim=1) @ F.normalize(candidates, dim=1).T / temperature
        log_likelihoods.append(logits.log_softmax(dim=1))
    return torch.stack(contrasts).mean() + alpha * mean_divergence(torch.stack(log_likelihoods))


def mean_divergence(log_p: torch.Tensor) -> torch.Tensor:
    """Mean of KL(p_a || p_b) over ordered pairs a != b of Q distributions, and over rows.

    Args:
        log_p: logarithms of the distributions, shape (Q, N, K), over the last axis.

    Returns:
        A scalar; 0 for Q = 1.
    """
    count = len(log_p)
    # sum over a, b of <p_a, log p_a - log p_b>; a = b adds nothing to the sum
    divergence = (log_p.exp() * (log_p - log_p.mean(dim=0))).sum(dim=2).mean()
    return divergence * count / max(count - 1, 1)
