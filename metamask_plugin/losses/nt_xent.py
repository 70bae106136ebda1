"""Normalised-temperature cross-entropy: the contrastive loss of SimCLR and of MetaMask's Eq. (1)."""

from collections.abc import Sequence
from itertools import permutations

import torch
import torch.nn.functional as F


def nt_xent_loss(
    views: Sequence[torch.Tensor],
    temperature: float = 0.5,
    symmetric: bool = True,
    bank: torch.Tensor | None = None,
) -> torch.Tensor:
    """Contrastive loss over all views of a batch, Eq. (1) of [0] with d the cosine similarity.

    For anchor z_i^j and positive z_i^k the term is

        -log exp(d(z_i^j, z_i^k) / tau) / sum_{(i', j') != (i, j)} exp(d(z_i^j, z_i'^j') / tau)

    Eq. (1) sums over samples and takes each pair of views once, the earlier view as the anchor;
    SimCLR [1], which the paper follows, takes each pair both ways. Here terms are averaged, so that
    the value depends on neither the batch size nor the number of views.

    Args:
        views: M >= 2 projections, each of shape (N, P); they need not be normalised.
        temperature: tau > 0.
        symmetric: take each pair of views both ways, as [1]; ``False`` is Eq. (1) to the letter,
            divided by N times the number of pairs.
        bank: further negatives of every anchor, shape (K, P), as a memory bank gives them.

    Returns:
        The mean of the terms, a scalar.

    Raises:
        ValueError: for fewer than two views, views of different shape, or tau <= 0.

    Example:
        >>> views = [torch.eye(3), torch.eye(3)]
        >>> round(nt_xent_loss(views, temperature=1.0).item(), 3)  # -log e / (e + 4)
        0.905

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    [1] Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, ICML 2020.
    """
    if len(views) < 2 or len({view.shape for view in views}) != 1 or views[0].dim() != 2:
        raise ValueError(
            "nt_xent_loss: views must be two or more tensors of one shape (N, P), got "
            f"{[tuple(view.shape) for view in views]}"
        )
    if not temperature > 0:
        raise ValueError(f"nt_xent_loss: temperature must be > 0, got {temperature}")

    n = len(views[0])
    z = F.normalize(torch.cat(list(views)), dim=1)
    logits = z @ z.T / temperature
    itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
    # log of the denominator: everything in the batch but the anchor itself
    log_denominator = logits.masked_fill(itself, float("-inf")).logsumexp(dim=1)
    if bank is not None and len(bank) > 0:
        with_bank = (z @ F.normalize(bank, dim=1).T / temperature).logsumexp(dim=1)
        log_denominator = torch.logaddexp(log_denominator, with_bank)
    log_denominator = log_denominator.view(-1, n)

    pairs = [(j, k) for j, k in permutations(range(len(views)), 2) if symmetric or j < k]
    terms = [
        log_denominator[j] - logits[j * n : (j + 1) * n, k * n : (k + 1) * n].diagonal() for j, k in pairs
    ]
    return torch.stack(terms).mean()
