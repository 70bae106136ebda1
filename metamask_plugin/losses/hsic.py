"""Dependence on the image's identity, measured with kernels: SSL-HSIC."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

KERNELS = ("imq", "gaussian", "linear")
SMALLEST_SCALE = 0.01
EPSILON = 1e-12


def hsic_loss(
    views: Sequence[torch.Tensor], gamma: float = 3.0, kernel: str = "imq", scale: float = 1.0
) -> torch.Tensor:
    """-HSIC(Z, Y) + gamma sqrt( HSIC(Z, Z) ), Eq. (4) of [0], with Y the identity of the image.

    Of exact kernels, in time quadratic in the number of all projections. The authors approximate them by
    random Fourier features, which is linear; batches of some hundreds do not need that. A constant 1e-12
    under the root keeps derivatives finite where all projections coincide.

    Args:
        views: V >= 2 projections of the same N >= 2 images, each of shape (N, P); they need not be
            normalised. All have equal parts in both terms.
        gamma: weight of the second term, >= 0; 3 in [0].
        kernel: k on normalised projections, see :func:`gram_matrix`.
        scale: c of the kernel.

    Returns:
        A scalar.

    Raises:
        ValueError: for views that do not fit, one image (its identity is a constant, on which nothing
            depends), gamma < 0, an unknown kernel, or c < 0.01.

    Example:
        >>> views = [torch.eye(2), torch.eye(2)]
        >>> loss = hsic_loss(views, gamma=0.0, kernel="linear")
        >>> round(loss.item(), 3)  # kernel 1 of one image, 1/2 of all
        -0.5

    [0] Li et al., *Self-Supervised Learning with Kernel Dependence Maximization*, NeurIPS 2021.
    """
    if len(views) < 2 or len({view.shape for view in views}) != 1 or views[0].dim() != 2:
        raise ValueError(
            "hsic_loss: views must be two or more tensors of one shape (N, P), got "
            f"{[tuple(view.shape) for view in views]}"
        )
    if len(views[0]) < 2:
        raise ValueError("hsic_loss: views must hold 2 images or more, got 1")
    if not gamma >= 0:
        raise ValueError(f"hsic_loss: gamma must be >= 0, got {gamma}")
    gram = gram_matrix(torch.cat(list(views)), kernel, scale)
    return gamma * (hsic_zz(gram) + EPSILON).sqrt() - hsic_zy(gram, len(views))


def gram_matrix(z: torch.Tensor, kernel: str = "imq", scale: float = 1.0) -> torch.Tensor:
    """k of all pairs of rows, normalised before.

    - ``imq``, inverse multiquadric: c / sqrt(c^2 + ||z - z'||^2), the kernel of [0];
    - ``gaussian``: exp(-||z - z'||^2 / (2 c^2));
    - ``linear``: the inner product.

    Each is 1 for z = z'.

    Args:
        z: shape (n, P).
        kernel: one of the three.
        scale: c, at least 0.01: the distances' rounding in float32 would decide smaller ones' values.

    Returns:
        Shape (n, n).

    Raises:
        ValueError: for another kernel, or c < 0.01.

    [0] Li et al., *Self-Supervised Learning with Kernel Dependence Maximization*, NeurIPS 2021.
    """
    if kernel not in KERNELS:
        raise ValueError(f"gram_matrix: kernel must be one of {', '.join(KERNELS)}, got {kernel!r}")
    if not scale >= SMALLEST_SCALE:
        raise ValueError(f"gram_matrix: scale must be >= {SMALLEST_SCALE}, got {scale}")
    z = F.normalize(z, dim=1)
    cosine = z @ z.T
    if kernel == "linear":
        return cosine
    # the squared distance, which, unlike the distance, has derivatives of every order at 0
    distance = 2 - 2 * cosine
    if kernel == "gaussian":
        return (-distance / (2 * scale**2)).exp()
    return scale * (scale**2 + distance).rsqrt()


def hsic_zy(gram: torch.Tensor, views: int) -> torch.Tensor:
    """HSIC of projections and image identities, Eq. (5) of [0] without its constant factor.

        mean of k over ordered pairs of different views of one image  -  mean of k over all pairs

    As the official release computes it, whose factor is 1 too (gamma = 3 goes with it), less the constant
    1 / (V - 1) that each projection's pair with itself makes there.

    Args:
        gram: k of all pairs of V * N projections, view by view, shape (V * N, V * N).
        views: V >= 2.

    Returns:
        A scalar.

    [0] Li et al., *Self-Supervised Learning with Kernel Dependence Maximization*, NeurIPS 2021.
    """
    images = len(gram) // views
    same = gram.view(views, images, views, images).diagonal(dim1=1, dim2=3).sum() - gram.diagonal().sum()
    return same / (images * views * (views - 1)) - gram.mean()


def hsic_zz(gram: torch.Tensor) -> torch.Tensor:
    """HSIC of projections with themselves, the biased estimate tr(KHKH) / (n - 1)^2, Eq. (3) of [0].

    H takes the mean away. The official release divides by n^2.

    Args:
        gram: K, k of all pairs of n >= 2 projections, shape (n, n).

    Returns:
        A scalar, >= 0.

    [0] Li et al., *Self-Supervised Learning with Kernel Dependence Maximization*, NeurIPS 2021.
    """
    centred = gram - gram.mean(dim=0) - gram.mean(dim=1, keepdim=True) + gram.mean()
    return centred.square().sum() / (len(gram) - 1) ** 2
