"""Binary masks over the dimensions of frozen features, thousands at a time.

MetaMask's Figs. 2, 8 and 9 set random dimensions of a frozen representation to 0 and classify what is left
[0]. Here all masks of one encoder share the work: what a mask drops or keeps, whichever is less, is taken
from what is known of all dimensions or added up, so a mask that drops 5 % costs 5 % of the multiplications.

[0] Li et al., *MetaMask*, NeurIPS 2022, Section 3, A.4.3 and A.4.7.
"""

import re

import torch
import torch.nn.functional as F

from metamask_plugin.errors import UserError, check
from metamask_plugin.evaluation.features import Features, Progress
from metamask_plugin.evaluation.knn import check_bank, check_settings, vote, vote_temperature
from metamask_plugin.evaluation.masked_neighbours import MaskedNeighbours, plan_masks

# similarities held at once: 8 MB, which stay in a processor's cache, and 1 GB on an accelerator
CHUNK_ENTRIES, ACCELERATOR_CHUNK_ENTRIES = 2_000_000, 250_000_000


def random_masks(
    dim: int,
    rate: float,
    count: int,
    generator: torch.Generator | None = None,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """Masks that each drop the same number of dimensions, every choice of them equally likely.

    Args:
        dim: D.
        rate: share of the dimensions to drop, of ``among`` if given; 0 to 1.
        count: number of masks R.
        generator: of the draws, on the CPU; the global one by default.
        among: the dimensions that may be dropped, as bool (D,) or as indices; all by default.

    Returns:
        bool, shape (R, D), True for a dimension that is kept; ``round(rate * len(among))`` are False.

    Raises:
        UserError: for a rate outside 0 to 1, or ``among`` that does not fit.
    """
    check(0 <= rate <= 1, "mask rate", "from 0 to 1", rate, "5 % is 0.05")
    check(count >= 0, "number of masks", ">= 0", count)
    pool = torch.arange(dim) if among is None else among.cpu()
    if pool.dtype == torch.bool:
        check(pool.shape == (dim,), "among", f"one truth value for each of {dim}", tuple(pool.shape))
        pool = pool.nonzero().flatten()
    inside = pool.numel() == 0 or (int(pool.min()) >= 0 and int(pool.max()) < dim)
    check(inside and len(pool.unique()) == len(pool), "among", f"different dimensions below {dim}", pool)
    drawn = torch.rand(count, len(pool), generator=generator).argsort(dim=1)
    masks = torch.ones(count, dim, dtype=torch.bool)
    return masks.scatter_(1, pool[drawn[:, : round(rate * len(pool))]], False)


def below_average(weights: torch.Tensor) -> torch.Tensor:
    """The dimensions that A.4.7 of MetaMask takes for confounders: bool (D,), weight below the mean."""
    weights = weights.detach().flatten()
    return weights < weights.mean()


def masked_knn_correct(
    train: Features,
    test: Features,
    masks: torch.Tensor,
    k: int = 20,
    temperature: float | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Which test images the kNN classifier gets right under each mask.

    The classifier of :func:`~metamask_plugin.evaluation.knn.knn_accuracies` with cosine distance, on features
    times the mask. A mask costs ``N * M * min(dropped, kept)`` multiplications and one search through the
    N x M similarities. Where the dropped dimensions hold nearly all of an image's length, its mask is
    computed from the kept ones instead, as a difference of nearly equal numbers has no digits left.

    Args:
        train: the bank, (M, D).
        test: (N, D).
        masks: bool, shape (R, D), True for a dimension that is kept.
        k: number of neighbours; one above M is clipped to M.
        temperature: of the votes; by default :func:`~metamask_plugin.evaluation.knn.vote_temperature`'s.
        device: where to compute; by default where the features are.
        progress: called with (masks done, R) now and then.

    Returns:
        bool, shape (R, N), on the CPU.

    Raises:
        UserError: for features, labels or masks that do not fit, or a mask that keeps nothing.
    """
    check_settings((k,), temperature, "cosine")
    temperature = vote_temperature(k, temperature)
    check_bank(train.feats, train.labels, test.feats, test.labels)
    masks = _checked_masks(masks, train.feats.shape[1])
    device = torch.device(device) if device is not None else train.feats.device
    search = MaskedNeighbours(train.feats.to(device), test.feats.to(device), k)
    bank_labels, labels = train.labels.to(device), test.labels.to(device)
    num_classes = int(max(bank_labels.max(), labels.max())) + 1
    correct = torch.empty(len(masks), len(labels), dtype=torch.bool)
    entries = CHUNK_ENTRIES if device.type == "cpu" else ACCELERATOR_CHUNK_ENTRIES
    images = min(len(labels), max(1, entries // search.padded_size))
    # a mask's columns of the bank, at most half, are held too
    together = max(1, entries // (search.padded_size * max(images, masks.shape[1] // 2)))
    chunks = list(search.plan(masks, together))
    starts = range(0, len(labels), images)
    done = 0
    for start in starts:
        rows = slice(start, start + images)
        full, near = search.unmasked(rows)
        for members, columns, kept in chunks:
            similarities, neighbours = search.nearest(rows, full, near, columns, kept)
            votes = vote(
                similarities.flatten(0, 1),
                bank_labels[neighbours.flatten(0, 1)],
                num_classes,
                temperature,
                "cosine",
            )
            predicted = votes.argmax(dim=1).view(len(members), -1)
            correct[members, rows] = (predicted == labels[rows]).cpu()
            done += len(members)
            if progress is not None:
                progress(done // len(starts), len(masks))
    return correct


def masked_probe_correct(
    train: Features,
    test: Features,
    masks: torch.Tensor,
    ridge: float = 1e-3,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Which test images a linear least-squares probe, fitted anew for each mask, gets right.

    Ridge regression of the one-hot labels on the features, which are standardised over the training images:
    ``W = (X^T X / M + ridge * I)^-1 X^T Y / M`` over the kept dimensions, with an intercept that is not
    penalised. The second moments of all dimensions are computed once. A mask that keeps less than half solves
    its own system, by Cholesky; from one that keeps more the dropped part is projected out of the solution of
    all, ``W - P[:, d] P[d, d]^-1 W[d]`` with ``P`` the inverse. Both are exact; all is in float64.

    Args:
        train: (M, D).
        test: (N, D).
        masks: bool, shape (R, D), True for a dimension that is kept.
        ridge: penalty relative to a standardised dimension's variance, > 0.
        device: where to compute; by default where the features are.
        progress: called with (masks done, R) now and then.

    Returns:
        bool, shape (R, N), on the CPU.

    Raises:
        UserError: for features, labels or masks that do not fit, or a mask that keeps nothing.
    """
    check(ridge > 0, "ridge", "> 0", ridge, "0.001 is the default")
    check_bank(train.feats, train.labels, test.feats, test.labels)
    masks = _checked_masks(masks, train.feats.shape[1])
    device = torch.device(device) if device is not None else train.feats.device
    labels = test.labels.to(device)
    x, z = train.feats.to(device).double(), test.feats.to(device).double()
    variance, mean = torch.var_mean(x, dim=0, correction=0)
    varies = variance > 1e-12 * mean**2  # more than float32 rounds
    scale = varies / torch.where(varies, variance, 1.0).sqrt()
    x, z = (x - mean) * scale, (z - mean) * scale
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    y = F.one_hot(train.labels.to(device), num_classes).double()
    intercept = y.mean(dim=0)
    gram, moments = x.T @ x / len(x), x.T @ (y - intercept) / len(x)
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    solution = inverse @ moments
    scores_of_all, through_inverse = z @ solution, z @ inverse
    correct = torch.empty(len(masks), len(labels), dtype=torch.bool)
    done = 0
    for members, columns, kept in plan_masks(masks, masks.sum(dim=1) * 2 < masks.shape[1], _probe_chunk):
        columns = columns.to(device)
        absent = columns == masks.shape[1]
        system = _sub_matrices(gram if kept else inverse, columns)
        system = system + torch.diag_embed(absent.double())  # filled up with variables of no effect
        right = F.pad(moments if kept else solution, (0, 0, 0, 1))[columns]
        part = torch.cholesky_solve(right, torch.linalg.cholesky(system))
        weights = part.new_zeros(len(members), masks.shape[1] + 1, num_classes)
        weights.scatter_add_(1, columns[..., None].expand_as(part), part)
        base = z if kept else through_inverse
        scores = base @ weights[:, :-1] if kept else scores_of_all - base @ weights[:, :-1]
        correct[members] = ((scores + intercept).argmax(dim=2) == labels).cpu()
        done += len(members)
        if progress is not None:
            progress(done, len(masks))
    return correct


def _probe_chunk(width: int) -> int:
    return max(1, min(64, CHUNK_ENTRIES // max(1, width * width)))


def _sub_matrices(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    padded = F.pad(matrix, (0, 1, 0, 1))
    return padded[columns[:, :, None], columns[:, None, :]]


def masked_correct(
    train: Features,
    test: Features,
    masks: torch.Tensor,
    metric: str = "knn20",
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """:func:`masked_knn_correct` for the metric ``knn<k>``, :func:`masked_probe_correct` for ``linear``.

    Raises:
        UserError: for another metric, and as those two.
    """
    if metric == "linear":
        return masked_probe_correct(train, test, masks, device=device, progress=progress)
    k = re.fullmatch(r"knn(\d+)", metric)
    check(k is not None, "metric", "knn<k> or linear", metric, "knn20 is 20 nearest neighbours")
    return masked_knn_correct(train, test, masks, int(k[1]), device=device, progress=progress)


def _checked_masks(masks: torch.Tensor, dim: int) -> torch.Tensor:
    fits = masks.ndim == 2 and masks.shape[1] == dim and masks.dtype == torch.bool
    check(fits, "masks", f"bool of shape (R, {dim})", f"{masks.dtype} {tuple(masks.shape)}")
    masks = masks.cpu()
    empty = int((~masks.any(dim=1)).sum())
    if empty:
        raise UserError(
            f"masks must each keep at least one dimension, got {empty} of {len(masks)} that drop all {dim}; "
            "lower the mask rate"
        )
    return masks
