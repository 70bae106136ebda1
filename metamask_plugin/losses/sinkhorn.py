"""Codes by optimal transport: each image's share in every prototype, all prototypes used alike."""

import torch


@torch.no_grad()
def sinkhorn_codes(
    scores: torch.Tensor, epsilon: float = 0.05, iterations: int = 3, past: torch.Tensor | None = None
) -> torch.Tensor:
    """Codes of a batch by a few steps of Sinkhorn-Knopp, Eqs. (3) to (5) of [0].

    They approach the Q that maximises Tr(Q^T C^T Z) + epsilon H(Q) among all whose prototypes weigh the same,
    1 / K, and whose images weigh the same, 1 / B. Each iteration rescales the prototypes, then the images.
    Since the images come last, a code sums to 1 (Q is returned times B) after any number of iterations, while
    the prototypes' weights become equal only with many. Computed on logarithms, at least in float32, so that
    no epsilon is too small.

    Carries no gradient: codes are targets, as in [0].

    Args:
        scores: similarity of each image to each prototype, shape (B, K); [0] takes the cosine.
        epsilon: weight of the entropy, > 0; the smaller, the sharper the codes.
        iterations: >= 1.
        past: scores of a queue's images, shape (Q, K), which take part as if of the batch; their codes are
            thrown away (Section 3.1 of [0], "Working with small batches").

    Returns:
        Codes, shape (B, K), float32 or, where the scores are, float64. One image alone, no queue
        beside it, is shared equally by all prototypes, whatever its scores.

    Raises:
        ValueError: for scores of another shape, epsilon <= 0 or no iteration.

    Example:
        >>> scores = torch.tensor([[1.0, 0.0], [1.0, 0.8]])  # both are nearer to the first prototype
        >>> sinkhorn_codes(scores).argmax(dim=1)  # and use both
        tensor([0, 1])

    [0] Caron et al., *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments*,
        NeurIPS 2020.
    """
    if scores.dim() != 2 or 0 in scores.shape or past is not None and past.shape[1:] != scores.shape[1:]:
        raise ValueError(
            "sinkhorn_codes: scores must be (B, K), past (Q, K) or None, got "
            f"{tuple(scores.shape)} and {None if past is None else tuple(past.shape)}"
        )
    if not epsilon > 0:
        raise ValueError(f"sinkhorn_codes: epsilon must be > 0, got {epsilon}")
    if iterations < 1:
        raise ValueError(f"sinkhorn_codes: iterations must be >= 1, got {iterations}")
    joint = scores if past is None else torch.cat([scores, past])
    log_q = joint.to(torch.promote_types(joint.dtype, torch.float32)) / epsilon
    for _ in range(iterations):
        log_q = log_q - log_q.logsumexp(dim=0, keepdim=True)
        log_q = log_q - log_q.logsumexp(dim=1, keepdim=True)
    return log_q[: len(scores)].exp()
