"""Maps of features: images as points in two dimensions, near where their features are near.

Built as the pictures of :mod:`~metamask_plugin.evaluation.figures`, whose ``save`` writes them.
"""

import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.neighbors import NearestNeighbors

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.knn import DISTANCES

# more names than this fill a figure, and more colours nobody tells apart
MAX_NAMED_CLASSES = 20
# a panel's side in inches
SIDE = 4.4
# classes are drawn over each other in the same mixed order every time
ORDER_SEED = 0


def require_umap() -> ModuleType:
    """The library umap-learn.

    Raises:
        UserError: where it cannot be imported.
    """
    try:
        return import_module("umap")
    except ImportError as error:
        found = str(error).partition("\n")[0]
        raise UserError(
            f"umap-learn must be installed for a map, got {found!r}; pip install umap-learn"
        ) from error


def embed(
    feats: torch.Tensor,
    neighbours: int = 15,
    min_distance: float = 0.1,
    distance: str = "cosine",
    seed: int = 0,
) -> torch.Tensor:
    """Positions in two dimensions by UMAP [0], the same for the same seed.

    Axes, scale and the gaps between groups mean nothing, and no two maps share their positions; only which
    points are neighbours does.

    Args:
        feats: shape (N, D).
        neighbours: how many images count as near to one, itself among them: few show detail, many the whole.
        min_distance: how close two points may lie, from 0 to 1, where a group is about 1 across.
        distance: between features, ``"cosine"`` or ``"euclidean"``.
        seed: of the stochastic descent.

    Returns:
        float32, shape (N, 2), on the CPU.

    Raises:
        UserError: for a setting out of range, features that are all the same, or without umap-learn.

    Example:
        >>> embed(torch.randn(100, 64)).shape  # doctest: +SKIP
        torch.Size([100, 2])

    [0] McInnes, Healy and Melville, *UMAP: Uniform Manifold Approximation and Projection for Dimension
    Reduction*, 2018.
    """
    umap = require_umap()
    choose("distance", distance, DISTANCES)
    check(0 <= min_distance <= 1, "min_distance", "from 0 to 1", min_distance)
    # of fewer than four images there is no spectral map to start from
    within = f"at least 3 and below {len(feats)}, the number of images"
    check(3 <= neighbours < len(feats), "neighbours", within, neighbours)
    feats = feats.detach().float().cpu()
    differ = bool((feats != feats[:1]).any())
    remedy = "the encoder or its mask has collapsed: evaluate an earlier checkpoint"
    check(differ, "features", "different ones", f"{len(feats)} equal ones", remedy)
    feats = feats.numpy()
    # exact, and at once: for 4096 images or more umap-learn first compiles its approximate search for minutes
    search = NearestNeighbors(n_neighbors=neighbours, metric=distance, algorithm="brute").fit(feats)
    distances, indices = search.kneighbors(feats)
    reducer = umap.UMAP(
        n_neighbors=neighbours,
        min_dist=min_distance,
        metric=distance,
        precomputed_knn=(indices, distances.astype(np.float32), None),
        force_approximation_algorithm=True,  # else fewer than 4096 images are searched again
        random_state=seed,
        n_jobs=1,  # with more the seed would not decide
    )
    with warnings.catch_warnings():
        # that no further images can be placed, and that groups lie too far apart for one connected graph
        warnings.filterwarnings("ignore", category=UserWarning, module=r"umap|sklearn")
        return torch.from_numpy(reducer.fit_transform(feats)).float()


def class_maps(
    positions: Mapping[str, torch.Tensor], labels: torch.Tensor, classes: Sequence[str], title: str = ""
) -> Figure:
    """Maps of the same images side by side, in the colours of their classes; up to 20 classes are named.

    Args:
        positions: shape (N, 2) by the title of the panel.
        labels: index into ``classes`` for each image, shape (N,).
        classes: all class names: a class keeps its colour where others are missing.
        title: above the panels.

    Raises:
        UserError: without positions, or for shapes that do not fit.

    Example:
        >>> positions, labels = torch.randn(30, 2), torch.arange(30) % 2
        >>> figure = class_maps({"features": positions}, labels, ["cat", "dog"])
        >>> [axes.get_title() for axes in figure.axes]
        ['features']
    """
    check(len(positions) > 0, "positions", "those of at least one map", 0)
    labels = labels.cpu()
    for name, points in positions.items():
        fits = tuple(points.shape) == (len(labels), 2) and len(labels) > 0
        check(fits, f"positions of {name}", f"of shape ({len(labels)}, 2)", tuple(points.shape))
    named = len(classes) <= MAX_NAMED_CLASSES
    figure = Figure(figsize=(SIDE * len(positions) + (1.2 if named else 0), SIDE + 0.4), layout="constrained")
    palette = torch.tensor(_palette(len(classes)))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(ORDER_SEED))
    for axes, (name, points) in zip(
        figure.subplots(1, len(positions), squeeze=False).flat, positions.items()
    ):
        _draw(axes, points.cpu()[order], palette[labels[order]])
        axes.set_title(name, fontsize=10)
    if title:
        figure.suptitle(title, fontsize=10)
    if named:
        present = labels.unique().tolist()
        dots = [Line2D([], [], linestyle="", marker="o", color=palette[c].tolist()) for c in present]
        names = [classes[c] for c in present]
        figure.legend(dots, names, loc="outside right center", frameon=False, fontsize=8, title="class")
    return figure


def _palette(count: int) -> list[tuple[float, ...]]:
    """RGB for each class: one of few from a set that is told apart easily, one of many from the rainbow."""
    if count <= MAX_NAMED_CLASSES:
        colours = colormaps["tab10" if count <= 10 else "tab20"].colors
        return [tuple(colour) for colour in colours[:count]]
    return [tuple(colormaps["turbo"](index / (count - 1))[:3]) for index in range(count)]


def _draw(axes: Axes, points: torch.Tensor, colours: torch.Tensor) -> None:
    # the points cover about the same share of the panel, however many there are
    area = min(30.0, max(2.0, 25000 / len(points)))
    axes.scatter(
        *points.T.numpy(),
        s=area,
        c=colours.numpy(),
        alpha=0.7,
        linewidths=0,
        rasterized=True,  # in a PDF thousands of points would be slow to show
    )
    axes.set(xticks=[], yticks=[], box_aspect=1)
    axes.margins(0.04)
    axes.spines[:].set_color("#CCCCCC")
