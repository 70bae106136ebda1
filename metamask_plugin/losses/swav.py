"""SwAV's swapped prediction: the code of one view, predicted from another."""

import math
from collections.abc import Sequence

import torch


def swapped_prediction_loss(
    codes: torch.Tensor, scores: torch.Tensor, temperature: float = 0.1
) -> torch.Tensor:
    """Cross-entropy between the codes of one view and the prediction from another, Eq. (2) of [0].

        mean over images of   -sum_k q_k log( 1/n sum_t p_k,t ),     p_t = softmax(scores_t / tau)

    With one prediction an image this is [0]'s; with n strata of it, the average over them stands inside the
    logarithm, as in ICL-MSR's Eqs. (2) to (4) [1]: the likelihood of the code under do(X).

    Args:
        codes: q, shape (N, K), rows that sum to 1.
        scores: of the predicting view to the prototypes, shape (N, K), or of its strata, (N, n, K).
        temperature: tau > 0.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, or tau <= 0.

    Example:
        >>> codes, scores = torch.eye(4), torch.zeros(4, 4)
        >>> round(swapped_prediction_loss(codes, scores).item(), 3)  # log 4
        1.386

    [0] Caron et al., *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments*,
        NeurIPS 2020.
    [1] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    strata = scores if scores.dim() == 3 else scores[:, None]
    if codes.dim() != 2 or strata.dim() != 3 or (len(strata), strata.shape[2]) != tuple(codes.shape):
        raise ValueError(
            "swapped_prediction_loss: codes must be (N, K), scores (N, K) or (N, n, K), got "
            f"{tuple(codes.shape)} and {tuple(scores.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"swapped_prediction_loss: temperature must be > 0, got {temperature}")
    log_p = (strata / temperature).log_softmax(dim=2).logsumexp(dim=1) - math.log(strata.shape[1])
    return -(codes * log_p).sum(dim=1).mean()


def multi_crop_loss(
    codes: Sequence[torch.Tensor], scores: Sequence[torch.Tensor], temperature: float = 0.1
) -> torch.Tensor:
    """The codes of the first views, each predicted from every other view: Eq. (6) of [0].

    With codes of both of two views this is Eq. (1). Both equations sum; the mean here, as in the authors'
    code, keeps the value independent of the number of views.

    Args:
        codes: of the first views, the large crops, (N, K) each.
        scores: of all M >= 2 views, large crops first, (N, K) or (N, n, K) each.
        temperature: tau > 0.

    Returns:
        The mean of :func:`swapped_prediction_loss` over the pairs of a code and another view, a scalar.

    Raises:
        ValueError: for fewer than two views, no codes, or more codes than views; and as that function.

    Example:
        >>> codes, scores = [torch.eye(4)] * 2, [torch.zeros(4, 4)] * 3  # 2 of 3 crops are large
        >>> round(multi_crop_loss(codes, scores).item(), 3)  # log 4
        1.386

    [0] Caron et al., *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments*,
        NeurIPS 2020.
    """
    if len(scores) < 2 or not 1 <= len(codes) <= len(scores):
        raise ValueError(
            "multi_crop_loss: scores must be of two or more views and codes of one or more of them, got "
            f"{len(scores)} and {len(codes)}"
        )
    return torch.stack(
        [
            swapped_prediction_loss(code, view, temperature)
            for i, code in enumerate(codes)
            for v, view in enumerate(scores)
            if v != i
        ]
    ).mean()
