"""Classifies frozen features under binary masks over their dimensions, thousands of masks at a time.

MetaMask's Figs. 2, 8 and 9 set random dimensions of a frozen representation to 0 and classify what is left
[0]. All masks of one encoder share the work: what a mask drops is subtracted from what is known of all
dimensions, or what it keeps is added up, whichever is less. A mask that drops 5 % costs 5 % of the
multiplications.

[0] Li et al., *MetaMask*, NeurIPS 2022, Section 3, A.4.3 and A.4.7.
"""

import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F

from metamask_plugin.errors import UserError, check

Array = torch.Tensor | np.ndarray
Labelled = tuple[torch.Tensor, torch.Tensor]
Progress = Callable[[int, int], None]
Predictions = Iterator[tuple[torch.Tensor, slice, torch.Tensor]]
"""Mask numbers (r,), which images, and their predicted classes (r, n)."""

# similarities held at once: 8 MB, which stay in a processor's cache, and 1 GB on an accelerator
CHUNK_ENTRIES, ACCELERATOR_CHUNK_ENTRIES = 2_000_000, 250_000_000

# share of an image's squared length that must be left for the dropped part to be subtracted: what is left is
# divided by it, and so is float32's rounding
MIN_ENERGY = 0.1


def random_masks(
    dim: int,
    rate: float,
    count: int,
    generator: torch.Generator | None = None,
    among: torch.Tensor | None = None,
) -> torch.Tensor:
    """Draws masks that each drop the same number of dimensions, every choice of them equally likely.

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

    >>> random_masks(4, 0.25, 3, torch.Generator().manual_seed(0)).sum(dim=1)
    tensor([3, 3, 3])
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


def standardise(feats: torch.Tensor, like: torch.Tensor | None = None) -> torch.Tensor:
    """Scales features (N, D) to zero mean and unit variance over the images, in float64.

    Args:
        feats: shape (N, D).
        like: features (M, D) whose mean and variance are used; by default ``feats``.

    Returns:
        Shape (N, D). Dimensions that do not vary by more than float32 rounds become 0.
    """
    variance, mean = torch.var_mean((feats if like is None else like).double(), dim=0, correction=0)
    varies = variance > 1e-12 * mean**2
    return (feats.double() - mean) * (varies / torch.where(varies, variance, 1.0).sqrt())


def labelled(features: Array, labels: Array, split: str) -> Labelled:
    """Features (N, D) and labels (N,) as tensors.

    Raises:
        UserError: for no images, NaN or infinity, or labels that do not fit.
    """
    features, labels = torch.as_tensor(features).detach(), torch.as_tensor(labels).long()
    name, shape = f"{split} features", tuple(features.shape)
    check(features.ndim == 2 and features.numel() > 0, name, "of shape (N, D), N and D >= 1", shape)
    check(bool(features.isfinite().all()), name, "finite", "NaN or infinity", "has the encoder diverged?")
    fits = labels.shape == features.shape[:1]
    check(fits, f"{split} labels", f"one for each of {len(features)} images", tuple(labels.shape))
    remedy = "leave out unlabelled images"
    check(int(labels.min()) >= 0, f"{split} labels", ">= 0", int(labels.min()), remedy)
    return features, labels


def masked_correct(
    train: tuple[Array, Array],
    test: tuple[Array, Array],
    masks: torch.Tensor,
    metric: str = "knn20",
    temperature: float = 0.07,
    ridge: float = 1e-3,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Finds out which test images a classifier gets right under each mask.

    - ``knn<k>``: a vote of the k nearest training images by cosine, with weights ``exp(cosine /
      temperature)``, on features times the mask. A mask costs ``N * M * min(dropped, kept)`` multiplications
      and one search through the N x M similarities. Where the dropped dimensions hold nearly all of an
      image's length, its mask is computed from the kept ones, as a difference of nearly equal numbers has no
      digits left.
    - ``linear``: ridge regression of the one-hot labels on the features, fitted anew for each mask. Features
      are standardised over the training images: ``W = (X^T X / M + ridge * I)^-1 X^T Y / M`` over the kept
      dimensions, with an intercept that is not penalised. The second moments of all dimensions are computed
      once. A mask that keeps less than half solves its own system; from one that keeps more, the dropped part
      is projected out of the solution of all, ``W - P[:, d] P[d, d]^-1 W[d]`` with ``P`` the inverse. Both
      are exact, in float64.

    Args:
        train: features (M, D) and labels (M,) that the classifier learns from.
        test: features (N, D) and labels (N,).
        masks: bool, shape (R, D), True for a dimension that is kept.
        metric: ``knn<k>``, e.g. ``knn20``, or ``linear``. A k above M is clipped to M.
        temperature: of the votes, > 0.
        ridge: penalty of the probe relative to a standardised dimension's variance, > 0.
        device: where to compute; by default where the features are.
        progress: called with (masks done, R) now and then.

    Returns:
        bool, shape (R, N), on the CPU.

    Raises:
        UserError: for features, labels or masks that do not fit, a mask that keeps nothing, or a setting out
            of range.

    >>> feats, labels = torch.tensor([[1.0, 1], [1, -1], [-1, 1], [-1, -1]]), torch.tensor([0, 1, 0, 1])
    >>> masks = torch.tensor([[False, True], [True, False]])  # the class is in the second dimension
    >>> masked_correct((feats, labels), (feats, labels), masks, "linear").sum(dim=1)
    tensor([4, 2])
    """
    check(temperature > 0, "temperature", "> 0", temperature, "0.07 is the usual value")
    check(ridge > 0, "ridge", "> 0", ridge, "0.001 is the default")
    k = re.fullmatch(r"knn([1-9]\d*)", metric)
    known = metric == "linear" or k is not None
    check(known, "metric", "knn<k> or linear", metric, "knn20 is 20 nearest neighbours")
    bank, tested = labelled(*train, "training"), labelled(*test, "test")
    dims = (bank[0].shape[1], tested[0].shape[1])
    check(dims[0] == dims[1], "training and test features", "of the same dimension", dims)
    masks = _checked_masks(masks, dims[0])
    device = torch.device(device) if device is not None else bank[0].device
    bank, tested = ((feats.to(device), labels.to(device)) for feats, labels in (bank, tested))
    labels = tested[1]
    if k is None:
        found = _probe(bank, tested, masks, ridge)
    else:
        found = _knn(bank, tested, masks, int(k[1]), temperature)
    correct = torch.empty(len(masks), len(labels), dtype=torch.bool)
    done = 0
    for members, rows, predicted in found:
        correct[members, rows] = (predicted == labels[rows]).cpu()
        done += predicted.numel()
        if progress is not None:
            progress(done // len(labels), len(masks))
    return correct


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


def _plan(
    masks: torch.Tensor, kept: torch.Tensor, together: Callable[[int], int]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, bool]]:
    """Yields mask numbers (r,), the columns that they keep or drop (r, c), and which of the two it is.

    Masks of similar numbers of columns come together; the shorter are filled up with column D.

    Args:
        masks: bool (R, D).
        kept: whether a mask is to be computed from what it keeps, bool (R,).
        together: how many masks fit into one chunk, by their number of columns.
    """
    for side in (False, True):
        members = (kept == side).nonzero().flatten()
        widths, order = (masks[members] == side).sum(dim=1).sort(descending=True)
        members = members[order]
        while len(members):
            width = int(widths[0])
            count = together(width)
            chunk, members, widths = members[:count], members[count:], widths[count:]
            chosen = masks[chunk] == side
            columns = chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
            yield chunk, torch.where(chosen.gather(1, columns), columns, masks.shape[1]), side


def _knn(train: Labelled, test: Labelled, masks: torch.Tensor, k: int, temperature: float) -> Predictions:
    bank, feats = (F.normalize(feats.float(), dim=1) for feats, _ in (train, test))
    size, k = len(bank), min(k, len(bank))
    group = max(1, round((size / k) ** 0.5))  # makes the two searches of _largest equally long
    bank = F.pad(bank, (0, 0, 0, -size % group))
    totals = bank.square().sum(dim=1), feats.square().sum(dim=1)
    energy = torch.cat([bank, feats]).square().T
    # by dimension, so that a mask takes whole rows; row D is that of no effect
    bank, feats = (F.pad(part.T, (0, 0, 0, 1)) for part in (bank, feats))
    # some masks at a time: the product is as large as their number times that of all images
    lost = [((~some).to(energy) @ energy).amax(dim=1).cpu() for some in masks.split(256)]
    kept = (masks.sum(dim=1) * 2 < masks.shape[1]) | (torch.cat(lost) > 1 - MIN_ENERGY)
    entries = CHUNK_ENTRIES if bank.device.type == "cpu" else ACCELERATOR_CHUNK_ENTRIES
    images = min(feats.shape[1], max(1, entries // bank.shape[1]))
    # a mask's columns of the bank, at most half, are held too
    together = max(1, entries // (bank.shape[1] * max(images, masks.shape[1] // 2)))
    chunks = list(_plan(masks, kept, lambda width: together))
    num_classes = int(train[1].max()) + 1
    for start in range(0, feats.shape[1], images):
        rows = slice(start, start + images)
        full = feats[:, rows].T @ bank
        for members, columns, of_kept in chunks:
            columns = columns.to(bank.device)
            parts = bank[columns], feats[columns][:, :, rows]  # (r, c, M), (r, c, n)
            inverse_norms = [
                _inverse_norm(part.square().sum(dim=1), None if of_kept else total)
                for part, total in zip(parts, (totals[0], totals[1][rows]))
            ]
            scale = inverse_norms[0][:, None]
            # the image's own length changes no order: only the k largest are divided by it
            similarity = torch.bmm(parts[1].mT, parts[0] * (scale if of_kept else -scale))
            if not of_kept:
                similarity.addcmul_(full, scale)
            similarity[..., size:] = -torch.inf
            values, indices = _largest(similarity, k, group)
            values = values * inverse_norms[1][..., None]
            # relative to the nearest, which changes no vote: exp(1 / T) overflows for a small T
            weights = ((values - values[..., :1]) / temperature).exp()
            scores = weights.new_zeros(*weights.shape[:2], num_classes)
            scores.scatter_add_(2, train[1][indices], weights)
            # in shares, as other nearest-neighbour classifiers have them: rounding decides between equals
            yield members, rows, (scores / scores.sum(dim=2, keepdim=True)).argmax(dim=2)


def _largest(values: torch.Tensor, k: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of the last dimension, sorted, and their indices.

    All of them lie in the k groups with the largest maxima: two short searches replace a long one.
    """
    groups = values.unflatten(-1, (group, -1))
    best = groups.amax(dim=-2).topk(k, sorted=False).indices
    among = groups.gather(-1, best.unsqueeze(-2).expand(*best.shape[:-1], group, k)).flatten(-2)
    values, places = among.topk(k)
    return values, places // k * groups.shape[-1] + best.gather(-1, places % k)


def _inverse_norm(energy: torch.Tensor, total: torch.Tensor | None) -> torch.Tensor:
    left = energy if total is None else (total - energy).clamp(min=0)
    # as F.normalize does: an image with nothing left is at cosine 0 from all others
    return 1 / left.sqrt().clamp(min=1e-12)


def _probe(train: Labelled, test: Labelled, masks: torch.Tensor, ridge: float) -> Predictions:
    x, z = standardise(train[0]), standardise(test[0], like=train[0])
    y = F.one_hot(train[1]).double()
    intercept = y.mean(dim=0)
    gram, moments = x.T @ x / len(x), x.T @ (y - intercept) / len(x)
    gram.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    solution = inverse @ moments
    scores_of_all, through_inverse = z @ solution, z @ inverse

    def together(width: int) -> int:
        return max(1, min(64, CHUNK_ENTRIES // max(1, width * width)))

    for members, columns, kept in _plan(masks, masks.sum(dim=1) * 2 < masks.shape[1], together):
        columns = columns.to(x.device)
        padded = F.pad(gram if kept else inverse, (0, 1, 0, 1))
        system = padded[columns[:, :, None], columns[:, None, :]]
        # filled up with variables of no effect
        system = system + torch.diag_embed((columns == masks.shape[1]).double())
        right = F.pad(moments if kept else solution, (0, 0, 0, 1))[columns]
        part = torch.cholesky_solve(right, torch.linalg.cholesky(system))
        weights = part.new_zeros(len(members), masks.shape[1] + 1, y.shape[1])
        weights = weights.scatter_add_(1, columns[..., None].expand_as(part), part)[:, :-1]
        scores = z @ weights if kept else scores_of_all - through_inverse @ weights
        yield members, slice(None), (scores + intercept).argmax(dim=2)
