"""Measures and draws how much the dimensions of a representation say the same, after Fig. 1a of MetaMask.

[0] Li et al., *MetaMask: Revisiting Dimensional Confounder for Self-Supervised Learning*, NeurIPS 2022.
[1] Roy and Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import entropy, rankdata

from metamask_plugin.audit.masks import standardise
from metamask_plugin.errors import check
from metamask_plugin.evaluation.features import Features

MAX_DRAWN_DIMS, MAX_DRAWN_IMAGES = 96, 200
BAR = {"location": "bottom", "shrink": 0.7, "aspect": 30, "pad": 0.02}


class Redundancy(NamedTuple):
    """What a row of :func:`similarity_figure` shows of an encoder.

    Attributes:
        ranks: of an image among all images in a dimension, in percent, shape (n, D), images sorted by class.
        labels: class of each row, shape (n,).
        contributions: shape (C, D), see :func:`class_contributions`.
        similarity: absolute correlation of dimensions over all images, shape (D, D).
    """

    ranks: torch.Tensor
    labels: torch.Tensor
    contributions: torch.Tensor
    similarity: torch.Tensor


def redundancy_numbers(features: Features | torch.Tensor) -> dict[str, float]:
    """Measures how far the dimensions are from decoupled.

    Args:
        features: or their ``feats`` alone, shape (N, D), N >= 2.

    Returns:
        ``dim``: D. ``varying``: how many of the dimensions vary over the images. ``mean_correlation``: mean
        absolute correlation of two different ones among these, 0 when decoupled, 1 when all say the same.
        ``effective_rank``: exp of the entropy of the covariance's eigenvalues, divided by their sum [1].
        ``participation_ratio``: of the same eigenvalues, (sum λ)² / sum λ². Both lie between 1, all variance
        in one direction, and D, the same in all, and cannot exceed N - 1; unlike the correlation they depend
        on the dimensions' scales. Where nothing varies, all three are NaN.

    Raises:
        UserError: for fewer than two images.
    """
    feats = features.feats if isinstance(features, Features) else features
    check(feats.ndim == 2 and len(feats) >= 2, "features", "of shape (N, D), N >= 2", tuple(feats.shape))
    feats = feats.detach().double().cpu()
    z = standardise(feats)
    varying = z.abs().amax(dim=0) > 0
    z, centred = z[:, varying], (feats - feats.mean(dim=0))[:, varying]
    correlation = mean_off_diagonal((z.T @ z / len(z)).abs())
    numbers = {"dim": feats.shape[1], "varying": int(varying.sum()), "mean_correlation": correlation}
    numbers = {name: float(value) for name, value in numbers.items()}
    if not varying.any():
        return numbers | {"effective_rank": math.nan, "participation_ratio": math.nan}
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    share = values / values.sum()
    return numbers | {
        "effective_rank": math.exp(entropy(share.numpy())),
        "participation_ratio": 1 / float(share.square().sum()),
    }


def mean_off_diagonal(matrix: torch.Tensor) -> float:
    """Mean over pairs of different rows, of a matrix (n, n); NaN where there is one row."""
    pairs = len(matrix) * (len(matrix) - 1)
    return float(matrix.sum() - matrix.diagonal().sum()) / pairs if pairs else math.nan


def class_contributions(features: Features) -> torch.Tensor:
    """What each dimension contributes to telling each class from the others, shape (C, D), float64.

    The difference between its mean over the images of the class and over all other images, in standard
    deviations within the two (Cohen's d): 0, nothing; positive, the dimension speaks for the class, negative,
    against it. No classifier with settings of its own is involved. 0 where a dimension does not vary, and
    where there is one class.

    Args:
        features: rows of the result are the classes that occur, in order.
    """
    z, labels = standardise(features.feats.cpu()), features.labels.cpu()
    rows = []
    for label in labels.unique():
        inside, outside = z[labels == label], z[labels != label]
        squares = sum((part - part.mean(dim=0)).square().sum(dim=0) for part in (inside, outside))
        within = (squares / len(z)).sqrt()
        difference = inside.mean(dim=0) - outside.mean(dim=0)
        # a dimension that is constant within both would be infinitely good: let it be as good as it gets here
        rows.append((difference / within.clamp(min=1e-3)).nan_to_num(0))
    return torch.stack(rows)


def redundancy(features: Features, images: int = MAX_DRAWN_IMAGES) -> Redundancy:
    """What there is to draw of an encoder.

    Ranks are drawn from blue over green to red. Values would be of one colour behind a ReLU, where features
    are skewed. Each dimension is turned so that it goes with the majority of the others, since a dimension
    and its negative say the same. Then in a redundant representation a row has one colour, and the more the
    colours of a row differ, the less similar the dimensions are [0].

    Args:
        features: of two images at least.
        images: how many are drawn at most, at equal steps through the classes.

    Raises:
        UserError: for fewer than two images.
    """
    feats, labels = features.feats.detach().cpu(), features.labels.cpu()
    check(len(feats) >= 2 and len(feats) == len(labels), "features", "2 or more images", len(feats))
    z = standardise(feats)
    correlation = z.T @ z / len(z)
    # a sign for each dimension, such that most correlations become positive
    leading = torch.linalg.eigh(correlation).eigenvectors[:, -1]
    signs = torch.where(leading * leading.sum() < 0, -1.0, 1.0).double()
    order = labels.argsort(stable=True)
    shown = order[_equal_steps(len(order), images)]
    ranks = torch.from_numpy(100 * (rankdata((z * signs).numpy(), axis=0) - 0.5) / len(z))
    return Redundancy(ranks[shown], labels[shown], class_contributions(features), correlation.abs())


def similarity_figure(encoders: Mapping[str, Features], max_dims: int = MAX_DRAWN_DIMS) -> Figure:
    """Draws Fig. 1a of [0] for several encoders, a row each, on the same images or not.

    Left: the features as an image, images sorted by class over dimensions. Middle: what each dimension
    contributes to each class (:func:`class_contributions`). Right: the absolute correlation of dimensions.
    The colours mean the same in all rows. The mean correlation and the effective rank in the title are over
    all dimensions; of these, at most ``max_dims`` are drawn, at equal steps.

    Args:
        encoders: features by the encoder's name.
        max_dims: dimensions drawn.

    Raises:
        UserError: for no encoder, or fewer than two images.
    """
    check(len(encoders) > 0, "encoders", "at least one", 0)
    drawn = {name: redundancy(features) for name, features in encoders.items()}
    limit = max(1e-6, *(float(parts.contributions.abs().quantile(0.99)) for parts in drawn.values()))
    figure = Figure(figsize=(11.5, 0.7 + 3.1 * len(drawn)), layout="constrained")
    grid = figure.subplots(len(drawn), 3, width_ratios=(1.25, 1.25, 1), squeeze=False)
    for axes, (name, parts) in zip(grid, drawn.items()):
        numbers = redundancy_numbers(encoders[name])
        pictures = _draw(axes, parts, _equal_steps(len(parts.similarity), max_dims), limit)
        rank, correlation = numbers["effective_rank"], numbers["mean_correlation"]
        similar = f"|correlation|, mean {correlation:.3f}\neffective rank {rank:.1f}"
        for panel, title in zip(axes, (name, "contribution to each class", similar)):
            panel.set_title(title, fontsize=10)
    labels = ("rank of the image in the dimension (%)", "for (+) or against (-) the class", "|correlation|")
    for column, (picture, label) in enumerate(zip(pictures, labels)):
        extend = "both" if column == 1 else "neither"
        figure.colorbar(picture, ax=grid[:, column], label=label, extend=extend, **BAR)
    return figure


def _draw(axes: Sequence[Axes], parts: Redundancy, shown: torch.Tensor, limit: float) -> list[ScalarMappable]:
    """Draws an encoder's three panels; returns what their colour bars are of."""
    images, classes, pairs = axes
    scale = {"cmap": "turbo", "vmin": 0, "vmax": 100, "interpolation": "nearest"}
    ranks = images.imshow(parts.ranks[:, shown].numpy(), aspect="auto", **scale)
    names, counts = parts.labels.unique(return_counts=True)
    ends = counts.cumsum(0)
    for end in ends[:-1].tolist():
        images.axhline(end - 0.5, color="white", linewidth=0.8)
    if len(names) <= 20:
        middles = (ends - counts / 2 - 0.5).tolist()
        images.set_yticks(middles, labels=[str(name) for name in names.tolist()])
    images.set(xlabel="feature dimension", ylabel="images, by class")
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    contributions = classes.imshow(parts.contributions[:, shown].numpy(), aspect="auto", **scale)
    classes.set(xlabel="feature dimension", ylabel="class")
    classes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    similarity = pairs.imshow(parts.similarity[shown][:, shown].numpy(), **scale)
    pairs.set(xlabel="feature dimension", ylabel="feature dimension")
    ticks = _equal_steps(len(shown), 5)
    for axis in (images.xaxis, classes.xaxis, pairs.xaxis, pairs.yaxis):
        axis.set_ticks(ticks.tolist(), labels=[str(dim) for dim in shown[ticks].tolist()])
    return [ranks, contributions, similarity]


def _equal_steps(count: int, most: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()
