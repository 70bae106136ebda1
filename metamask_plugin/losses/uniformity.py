"""ICL-MSR's uniformity loss: keeps an image's weight vectors apart."""

import torch
import torch.nn.functional as F

SCOPES = ("image", "batch")


def uniformity_loss(weights: torch.Tensor, t: float = 2.0, scope: str = "image") -> torch.Tensor:
    """L_uni, Eq. (9) of [0]: the log of the summed Gaussian potentials of all pairs of weight vectors.

        log sum_{i,j} exp(2 t a_i.a_j - 2 t),    every a normalised to length 1

    The sum takes every ordered pair, a vector with itself included, as Eq. (9) does.

    Args:
        weights: A, shape (N, n, C): n vectors over the channels for each of N images.
        t: the kernel's sharpness, > 0.
        scope: ``image``: pairs within one image's A, as Eq. (9) is written, averaged over the images;
            ``batch``: pairs among all N * n vectors of the batch, as in [1].

    Returns:
        A scalar, above log(n) (the pairs of a vector with itself), and 2 log(n) when all vectors
        agree; for ``batch``, N * n in place of n.

    Raises:
        ValueError: for another shape, t <= 0, or an unknown scope.

    Example:
        >>> weights = torch.ones(5, 6, 3)  # all vectors agree
        >>> round(uniformity_loss(weights).item(), 3)  # 2 log 6
        3.584

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    [1] Wang and Isola, *Understanding Contrastive Representation Learning through Alignment and
        Uniformity on the Hypersphere*, ICML 2020.
    """
    if weights.dim() != 3:
        raise ValueError(f"uniformity_loss: weights must have shape (N, n, C), got {tuple(weights.shape)}")
    if not t > 0:
        raise ValueError(f"uniformity_loss: t must be > 0, got {t}")
    if scope not in SCOPES:
        raise ValueError(f"uniformity_loss: scope must be one of {', '.join(SCOPES)}, got {scope!r}")
    a = F.normalize(weights, dim=-1)
    if scope == "batch":
        a = a.flatten(0, 1).unsqueeze(0)
    potentials = 2 * t * (a @ a.transpose(1, 2)) - 2 * t
    return potentials.flatten(1).logsumexp(dim=1).mean()
