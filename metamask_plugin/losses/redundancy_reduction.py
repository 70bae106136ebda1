"""The redundancy-reduction loss of Barlow Twins, in MetaMask's form and in the released one."""

import torch
import torch.nn.functional as F

FORMS = ("uncentred", "centred", "official")


def cross_correlation(z1: torch.Tensor, z2: torch.Tensor, form: str = "uncentred") -> torch.Tensor:
    """Cross-correlation matrix C of two views along the batch, Eq. (3) of [0].

    Args:
        z1: projections of view 1, shape (N, P).
        z2: projections of view 2, shape (N, P).
        form: ``uncentred`` is Eq. (3), which does not subtract the batch mean; ``centred`` does and
            is Barlow Twins' own [1]; ``official`` is MetaMask's release: centred, divided by the
            standard deviation with N - 1 and then by N, so that the diagonal ends at (N - 1) / N.

    Returns:
        C, shape (P, P), row k for dimension k of view 1; entries in [-1, 1]. A dimension that is
        zero (or, centred, constant) over the whole batch correlates 0 with everything.

    Raises:
        ValueError: for shapes that differ, or an unknown form.

    Example:
        >>> cross_correlation(torch.eye(2), torch.eye(2).flip(1))
        tensor([[0., 1.],
                [1., 0.]])

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    [1] Zbontar et al., *Barlow Twins*, ICML 2021.
    """
    if z1.shape != z2.shape or z1.dim() != 2:
        raise ValueError(
            f"cross_correlation: z1 and z2 must have one shape (N, P), got {tuple(z1.shape)} and "
            f"{tuple(z2.shape)}"
        )
    if form not in FORMS:
        raise ValueError(f"cross_correlation: form must be one of {', '.join(FORMS)}, got {form!r}")
    if form != "uncentred":
        z1, z2 = z1 - z1.mean(dim=0), z2 - z2.mean(dim=0)
    correlation = F.normalize(z1, dim=0).T @ F.normalize(z2, dim=0)
    if form == "official":
        correlation = correlation * ((len(z1) - 1) / len(z1))
    return correlation


def redundancy_reduction_loss(
    z1: torch.Tensor, z2: torch.Tensor, lamb: float = 5e-3, form: str = "uncentred"
) -> torch.Tensor:
    """L_drr for one pair of views, Eq. (2) of [0]: pull C towards the identity.

        sum_k (1 - C_kk)^2 + lambda * sum_{k != k'} C_kk'^2

    Args:
        z1: projections of view 1, shape (N, P).
        z2: projections of view 2, shape (N, P).
        lamb: lambda, the weight of the off-diagonal part ([1] uses 0.005).
        form: how C is computed, see :func:`cross_correlation`.

    Returns:
        A scalar; it is a sum, so it grows with P.

    Example:
        >>> alike, apart = torch.ones(4, 3), torch.eye(3)
        >>> round(redundancy_reduction_loss(alike, alike).item(), 3)  # all 6 off the diagonal are 1
        0.03
        >>> round(redundancy_reduction_loss(apart, apart).item(), 3)
        0.0

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    [1] Zbontar et al., *Barlow Twins*, ICML 2021.
    """
    correlation = cross_correlation(z1, z2, form)
    identity = torch.eye(len(correlation), device=correlation.device, dtype=correlation.dtype)
    weights = torch.full_like(correlation, lamb).fill_diagonal_(1.0)
    return (weights * (correlation - identity).pow(2)).sum()
