"""How much the dimensions of a representation say the same: pictures after Fig. 1a of MetaMask, and numbers.

[0] Li et al., *MetaMask: Revisiting Dimensional Confounder for Self-Supervised Learning*, NeurIPS 2022.
[1] Roy and Vetterli, *The effective rank: a measure of effective dimensionality*, EUSIPCO 2007.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import rankdata

from metamask_plugin.errors import check
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.figures import MAX_DRAWN_DIMS, label_dimensions, mean_correlation, standardise

MAX_DRAWN_IMAGES = 200
COLOURS = "turbo"


class Redundancy(NamedTuple):
    """What a row of :func:`similarity_figure` shows of an encoder.

    Attributes:
        colours: the features as an image, RGB in [0, 1], shape (n, D, 3), images sorted by class.
        labels: class of each of its rows, shape (n,).
        contributions: shape (C, D), see :func:`class_contributions`.
        similarity: absolute correlation of dimensions over all images, shape (D, D).
    """

    colours: torch.Tensor
    labels: torch.Tensor
    contributions: torch.Tensor
    similarity: torch.Tensor


def redundancy_numbers(features: Features | torch.Tensor) -> dict[str, float]:
    """How far the dimensions are from decoupled, as numbers.

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
    z = standardise(feats)
    varying = z.abs().amax(dim=0) > 0
    share = _spectrum(feats, varying)
    return {
        "dim": float(feats.shape[1]),
        "varying": float(varying.sum()),
        "mean_correlation": mean_correlation(feats),
        "effective_rank": math.exp(-float(torch.xlogy(share, share).sum())) if len(share) else math.nan,
        "participation_ratio": 1 / float(share.square().sum()) if len(share) else math.nan,
    }


def class_contributions(features: Features) -> torch.Tensor:
    """What each dimension contributes to telling each class from the others, shape (C, D), float64.

    The difference between its mean over the images of the class and over all other images, in standard
    deviations within the two (Cohen's d): 0, nothing; positive, the dimension speaks for the class, negative,
    against it. No classifier with settings of its own is involved. 0 where a dimension does not vary.

    Args:
        features: of two classes at least; rows of the result are the classes that occur, in order.
    """
    z, labels = standardise(features.feats), features.labels.cpu()
    rows = []
    for label in labels.unique():
        inside, outside = z[labels == label], z[labels != label]
        squares = sum((part - part.mean(dim=0)).square().sum(dim=0) for part in (inside, outside))
        within = (squares / len(z)).sqrt()
        difference = inside.mean(dim=0) - outside.mean(dim=0)
        # a dimension that is constant within both would be infinitely good: let it be as good as it gets here
        rows.append(difference / within.clamp(min=1e-3))
    return torch.stack(rows)


def redundancy(features: Features, images: int = MAX_DRAWN_IMAGES) -> Redundancy:
    """What there is to draw of an encoder.

    The picture's colours stand for an image's rank among all images in a dimension, from blue over green to
    red: features behind a ReLU are skewed, and their values would be of one colour. Each dimension is turned
    so that it goes with the majority of the others, since a dimension and its negative say the same. Then in
    a redundant representation a row has one colour, and the more the colours of a row differ, the less
    similar the dimensions are [0].

    Args:
        features: of two images and classes at least.
        images: how many are drawn at most, at equal steps through the classes.

    Raises:
        UserError: for fewer than two images or classes.
    """
    feats, labels = features.feats, features.labels.cpu()
    check(len(feats) >= 2 and len(feats) == len(labels), "features", "2 or more images", len(feats))
    check(len(labels.unique()) >= 2, "features", "of two classes or more", len(labels.unique()))
    z = standardise(feats)
    correlation = z.T @ z / len(z)
    order = labels.argsort(stable=True)
    shown = order[_equal_steps(len(order), images)]
    ranks = (rankdata((z * _directions(correlation)).numpy(), axis=0) - 0.5) / len(z)
    colours = torch.from_numpy(colormaps[COLOURS](ranks[shown.numpy()])[..., :3])
    return Redundancy(colours, labels[shown], class_contributions(features), correlation.abs())


def similarity_figure(encoders: Mapping[str, Features], max_dims: int = MAX_DRAWN_DIMS) -> Figure:
    """Fig. 1a of [0] for several encoders, a row each, on the same images or not.

    Left: the features as a colour image, images sorted by class over dimensions. Middle: what each dimension
    contributes to each class (:func:`class_contributions`). Right: the absolute correlation of dimensions.
    The colours mean the same in all rows. The mean correlation and the effective rank in the title are over
    all dimensions; of these, at most ``max_dims`` are drawn, at equal steps.

    Args:
        encoders: features by the encoder's name.
        max_dims: dimensions drawn.

    Raises:
        UserError: for no encoder, or fewer than two images or classes.
    """
    check(len(encoders) > 0, "encoders", "at least one", 0)
    drawn = {name: redundancy(features) for name, features in encoders.items()}
    limit = max(1e-6, *(float(parts.contributions.abs().quantile(0.99)) for parts in drawn.values()))
    figure = Figure(figsize=(11.5, 0.7 + 3.1 * len(drawn)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(drawn), 3, width_ratios=(1.25, 1.25, 1), squeeze=False)
    for axes, (name, parts) in zip(grid, drawn.items()):
        numbers = redundancy_numbers(encoders[name])
        pictures = _draw(axes, parts, _equal_steps(len(parts.similarity), max_dims), limit)
        axes[0].set_title(name, fontsize=10)
        axes[1].set_title("contribution to each class", fontsize=10)
        rank, correlation = numbers["effective_rank"], numbers["mean_correlation"]
        axes[2].set_title(f"|correlation|, mean {correlation:.3f}\neffective rank {rank:.1f}", fontsize=10)
    labels = ("rank of the image in the dimension (%)", "for (+) or against (-) the class", "|correlation|")
    for column, (picture, label) in enumerate(zip(pictures, labels)):
        bar = {"location": "bottom", "shrink": 0.7, "aspect": 30, "pad": 0.02}
        extend = "both" if column == 1 else "neither"
        figure.colorbar(picture, ax=grid[:, column], label=label, extend=extend, **bar)
    return figure


def _draw(axes: Sequence[Axes], parts: Redundancy, shown: torch.Tensor, limit: float) -> list[ScalarMappable]:
    """Draws an encoder's three panels; returns what their colour bars are of."""
    axes[0].imshow(parts.colours[:, shown].numpy(), aspect="auto", interpolation="nearest")
    # an RGB image has no colour bar of its own
    legend = ScalarMappable(Normalize(0, 100), COLOURS)
    classes, starts = _class_starts(parts.labels)
    for start in starts[1:]:
        axes[0].axhline(start - 0.5, color="white", linewidth=0.8)
    if len(classes) <= 20:
        ends = [*starts[1:], len(parts.labels)]
        middles = [(start + end - 1) / 2 for start, end in zip(starts, ends)]
        axes[0].set_yticks(middles, labels=[str(label) for label in classes])
    axes[0].set(xlabel="feature dimension", ylabel="images, by class")
    scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
    contributions = axes[1].imshow(parts.contributions[:, shown].numpy(), aspect="auto", **scale)
    axes[1].set(xlabel="feature dimension", ylabel="class")
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    scale = {"cmap": "viridis", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
    similarity = axes[2].imshow(parts.similarity[shown][:, shown].numpy(), **scale)
    axes[2].set(xlabel="feature dimension", ylabel="feature dimension")
    for axis in (axes[0].xaxis, axes[1].xaxis, axes[2].xaxis, axes[2].yaxis):
        label_dimensions(axis, shown)
    return [legend, contributions, similarity]


def _spectrum(feats: torch.Tensor, varying: torch.Tensor) -> torch.Tensor:
    """Shares of the covariance's eigenvalues in their sum; empty if nothing varies."""
    centred = feats.detach().double().cpu()[:, varying]
    if centred.shape[1] == 0:
        return centred.new_empty(0)
    centred = centred - centred.mean(dim=0)
    values = torch.linalg.eigvalsh(centred.T @ centred).clamp(min=0)
    return values / values.sum()


def _directions(correlation: torch.Tensor) -> torch.Tensor:
    """A sign for each dimension, shape (D,), such that most correlations become positive."""
    leading = torch.linalg.eigh(correlation).eigenvectors[:, -1]
    return torch.where(leading * leading.sum() < 0, -1.0, 1.0).double()


def _class_starts(labels: torch.Tensor) -> tuple[list[int], list[int]]:
    classes, counts = labels.unique(return_counts=True)
    return classes.tolist(), [0, *counts.cumsum(0)[:-1].tolist()]


def _equal_steps(count: int, most: int) -> torch.Tensor:
    return torch.linspace(0, count - 1, min(count, most)).round().long()
