"""W-MSE: whiten the batch, then bring the views of an image together."""

from collections.abc import Sequence
from itertools import combinations

import torch
import torch.nn.functional as F

from metamask_plugin.losses.contrastive import can_be_asked


def whiten(z: torch.Tensor, eps: float = 1e-3) -> torch.Tensor:
    """Projections with mean 0 and, for eps = 0, covariance I over the batch. Section 3 of [0].

        L^-1 (z - mean),   L L^T = (1 - eps) Sigma + eps I   (Cholesky),   Sigma over N - 1

    N images span N - 1 dimensions at most. Where that is fewer than P, eps alone makes Sigma invertible, and
    whitening makes the same regular simplex of any N different projections, up to a rotation: it no longer
    tells how they were scattered. [0] takes N = 2P.

    Computed in float64, autocast or not: float32 loses eps beside large entries of Sigma.

    Args:
        z: shape (N, P), N >= 2.
        eps: in [0, 1); above 0, the matrix is positive definite for every N. The authors' code has 0;
            1e-3 is chosen here.

    Returns:
        Shape (N, P), float32 or, where z is, float64.

    Raises:
        ValueError: for another shape, fewer than two images, eps out of range, or a covariance that cannot be
            decomposed (on a GPU the result is NaN then, and nothing is raised).

    [0] Ermolov et al., *Whitening for Self-Supervised Representation Learning*, ICML 2021.
    """
    if z.dim() != 2 or len(z) < 2:
        raise ValueError(f"whiten: z must be (N, P) with 2 images or more, got {tuple(z.shape)}")
    if not 0 <= eps < 1:
        raise ValueError(f"whiten: eps must be in [0, 1), got {eps}")
    centred = z.double() - z.double().mean(dim=0)
    identity = torch.eye(z.shape[1], dtype=centred.dtype, device=z.device)
    covariance = (1 - eps) * (centred.T @ centred) / (len(z) - 1) + eps * identity
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not can_be_asked(failed):
        factor = factor.masked_fill(failed > 0, float("nan"))
    elif failed:
        raise ValueError(
            f"whiten: the covariance must be positive definite, that of {len(z)} images in {z.shape[1]} "
            f"dimensions with eps {eps} is not; raise eps or the batch size, or lower the dimension"
        )
    whitened = torch.linalg.solve_triangular(factor, centred.T, upper=False).T
    return whitened.to(torch.promote_types(z.dtype, torch.float32))


def random_slices(
    images: int, size: int, iterations: int = 1, device: torch.device | None = None
) -> list[list[torch.Tensor]]:
    """Random partitions of a batch into the slices that are whitened on their own: batch slicing, [0].

    As many slices as there are times ``size`` images, as even as can be; so none is smaller than ``size``,
    unless the batch is, which then makes one slice. One slice needs no permutation: nothing is drawn, and one
    partition is enough.

    Args:
        images: N.
        size: of a slice, >= 2.
        iterations: number of partitions, >= 1.
        device: where the indices, and the random state that they are drawn from, are.

    Returns:
        For each partition its slices, indices of images.

    Raises:
        ValueError: for a size or a number of iterations out of range.

    [0] Ermolov et al., *Whitening for Self-Supervised Representation Learning*, ICML 2021.
    """
    if size < 2:
        raise ValueError(f"random_slices: size must be >= 2, got {size}")
    if iterations < 1:
        raise ValueError(f"random_slices: iterations must be >= 1, got {iterations}")
    if images < 2 * size:
        return [[torch.arange(images, device=device)]]
    return [
        list(torch.randperm(images, device=device).tensor_split(images // size)) for _ in range(iterations)
    ]


def whitened_mse_loss(
    views: Sequence[torch.Tensor],
    partitions: Sequence[Sequence[torch.Tensor]] | None = None,
    eps: float = 1e-3,
) -> torch.Tensor:
    """W-MSE: the distance between the whitened, normalised views of an image, Section 3 of [0].

        mean over pairs of views and images of   || w / |w| - w' / |w'| ||^2  =  2 - 2 cosine(w, w')

    Every view is whitened on its own, slice by slice, all views in the same slices, as in the authors' code:
    two views of an image never share a slice.

    Args:
        views: M >= 2 projections, each of shape (N, P).
        partitions: of the N images, as :func:`random_slices` gives them, over which the loss is averaged;
            None: the whole batch is one slice.
        eps: see :func:`whiten`.

    Returns:
        A scalar in [0, 4].

    Raises:
        ValueError: for fewer than two views or views of different shape; and as :func:`whiten`.

    Example:
        >>> z = torch.eye(4)
        >>> round(whitened_mse_loss([z, z]).item(), 3), round(whitened_mse_loss([z, -z]).item(), 3)
        (0.0, 4.0)

    [0] Ermolov et al., *Whitening for Self-Supervised Representation Learning*, ICML 2021.
    """
    if len(views) < 2 or len({view.shape for view in views}) != 1:
        raise ValueError(
            "whitened_mse_loss: views must be two or more tensors of one shape (N, P), got "
            f"{[tuple(view.shape) for view in views]}"
        )
    terms = []
    parts: Sequence[Sequence[torch.Tensor | slice]] = partitions or [[slice(None)]]
    for slices in parts:
        whitened = [
            F.normalize(torch.cat([whiten(view[index], eps) for index in slices]), dim=1) for view in views
        ]
        terms += [2 - 2 * (w1 * w2).sum(dim=1).mean() for w1, w2 in combinations(whitened, 2)]
    return torch.stack(terms).mean()
