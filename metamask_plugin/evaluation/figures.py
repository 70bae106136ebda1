"""Pictures of a training: its curves, its mask, and the correlation of its features.

Figures are built without pyplot: no global state, no display, nothing to close.
"""

import math
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from metamask_plugin.errors import check
from metamask_plugin.evaluation.files import replacing

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#9B5B9B", "#6F6F6F"

LOSSES = {
    "train_task_loss": ("task", BLUE),
    "train_redundancy_loss": ("redundancy reduction", ORANGE),
    "train_outer_loss": ("task after the trial step", GREEN),
    "train_msr_loss": ("backdoor-adjusted (MSR)", PURPLE),
    "train_uniformity_loss": ("uniformity of A", GREY),
}
BEFORE = "task before the trial step"
ACCURACIES = {
    "knn5": ("k = 5", PURPLE, "-"),
    "knn20": ("k = 20", BLUE, "-"),
    "knn200": ("k = 200", GREEN, "-"),
    "knn20_masked": ("k = 20, masked", ORANGE, "--"),
}

OF_AN_AXIS = r"\mathdefault"
"""In the numbers that matplotlib writes beside a logarithmic axis; these are formulas."""

MAX_TRAJECTORIES = 64
MAX_DRAWN_DIMS = 96


def training_curves(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Losses and nearest-neighbour accuracy over the epochs.

    Args:
        history: one mapping an epoch, with ``epoch`` (from 0; drawn from 1, as :func:`mask_weights` does)
            and any of the keys of :data:`LOSSES` and :data:`ACCURACIES`. Values that are missing or not
            finite are left out.

    Raises:
        UserError: for an empty history.
    """
    check(len(history) > 0, "history", "at least one epoch", 0)
    figure, (losses, accuracies) = _two_panels()
    for key, (label, colour) in LOSSES.items():
        _curve(losses, history, key, label=label, color=colour)
    _curve(losses, [_before(row) for row in history], "before", label=BEFORE, color=GREEN, linestyle=":")
    values = [value for line in losses.lines for value in line.get_ydata()]
    # the redundancy loss starts orders of magnitude above the others; the uniformity loss is a logarithm and
    # may be 0 or below, where there is no log scale
    if values and 0 < 10 * min(values) < max(values):
        losses.set_yscale("log")
    losses.set_title("Losses", fontsize=10)
    losses.set(xlabel="epoch", ylabel="mean over the epoch")
    for key, (label, colour, style) in ACCURACIES.items():
        _curve(accuracies, history, key, label=label, color=colour, linestyle=style)
    accuracies.set_title("Nearest-neighbour accuracy", fontsize=10)
    accuracies.set(xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            axes.legend(frameon=False, fontsize=8)
        else:
            axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color=GREY)
    return figure


def _before(row: Mapping[str, Any]) -> dict[str, Any]:
    """An epoch with its outer loss as it was before the trial steps, where that is known."""
    known = row.get("train_outer_loss"), row.get("train_trial_gain")
    return {**row, "before": None if None in known else sum(known)}


def mask_weights(final: torch.Tensor, history: torch.Tensor) -> Figure:
    """The learned mask: its weights in order, and how they got there.

    Args:
        final: effective weights, shape (D,).
        history: weights after each epoch, shape (T, D). At most 64 dimensions are drawn, at equal
            steps through the final order, over the band from the smallest to the largest of all.

    Raises:
        UserError: for shapes that do not fit.
    """
    final, history = final.detach().float().cpu(), history.detach().float().cpu()
    fits = history.ndim == 2 and history.shape[1:] == final.shape and len(history) > 0
    check(fits, "mask history", f"of shape (T, {len(final)})", tuple(history.shape))
    figure, (ordered, moving) = _two_panels()
    order = _draw_sorted_weights(ordered, final)
    epochs = range(1, len(history) + 1)
    band = (history.amin(dim=1).numpy(), history.amax(dim=1).numpy())
    moving.fill_between(epochs, *band, color=GREY, alpha=0.18, linewidth=0, label="smallest to largest")
    drawn = torch.linspace(0, len(final) - 1, min(len(final), MAX_TRAJECTORIES)).round().long()
    marker = "." if len(history) == 1 else None
    for rank in drawn.tolist():
        colour = colormaps["viridis"](rank / max(1, len(final) - 1))
        moving.plot(epochs, history[:, order[rank]].numpy(), color=colour, lw=0.7, alpha=0.75, marker=marker)
    moving.plot(
        epochs, history.mean(dim=1).numpy(), color=ORANGE, linestyle="--", label="mean", marker=marker
    )
    moving.set_title("Weights over the epochs", fontsize=10)
    moving.set(xlabel="epoch", ylabel="mask weight")
    moving.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    moving.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def feature_correlation(
    before: torch.Tensor,
    after: torch.Tensor,
    labels: torch.Tensor,
    names: tuple[str, str] = ("before training", "after training"),
) -> Figure:
    """What dimensions say about the classes, and about each other, after Fig. 1a of [0].

    For ``before`` and ``after``, a row each. Left: the mean of the standardised features of every
    class. Right: the absolute correlation between dimensions over the images; its mean outside the
    diagonal, over all dimensions that vary, is in the title. Each column has one colour scale. At most
    96 dimensions are drawn, at equal steps.

    Args:
        before: features, shape (N, D).
        after: features of the same images, shape (N, D') with D' = D or another.
        labels: shape (N,).
        names: of the two rows.

    Raises:
        UserError: for shapes that do not fit.

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    """
    lengths = (len(before), len(after), len(labels))
    check(min(lengths) == max(lengths) >= 2, "features", "2 or more, one for each label", lengths)
    labels = labels.cpu()
    standardised = [standardise(feats) for feats in (before, after)]
    means = [_class_means(z, labels) for z in standardised]
    # a symmetric scale that a few strong dimensions do not wash out
    limit = max(1e-6, max(float(m.abs().quantile(0.99)) for m in means))
    figure = Figure(figsize=(8.4, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, 2, width_ratios=(1.25, 1))
    for (left, right), z, mean, name in zip(grid, standardised, means, names):
        shown = torch.linspace(0, z.shape[1] - 1, min(z.shape[1], MAX_DRAWN_DIMS)).round().long()
        scale = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit, "interpolation": "nearest"}
        classes = left.imshow(mean[:, shown].numpy(), aspect="auto", **scale)
        left.set_title(f"{name}: class means", fontsize=10)
        left.set(xlabel="feature dimension", ylabel="class")
        left.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        correlation = (z.T @ z / len(z)).abs()
        scale = {"cmap": "viridis", "vmin": 0, "vmax": 1, "interpolation": "nearest"}
        pairs = right.imshow(correlation[shown][:, shown].numpy(), **scale)
        right.set_title(f"{name}: mean |correlation| {mean_correlation(z):.3f}", fontsize=10)
        right.set(xlabel="feature dimension", ylabel="feature dimension")
        for axis in (left.xaxis, right.xaxis, right.yaxis):
            label_dimensions(axis, shown)
    bar = {"location": "bottom", "shrink": 0.7, "aspect": 30, "pad": 0.02}
    figure.colorbar(classes, ax=grid[:, 0], label="mean standardised feature", extend="both", **bar)
    figure.colorbar(pairs, ax=grid[:, 1], label="|correlation| of two dimensions", **bar)
    return figure


def mean_correlation(feats: torch.Tensor) -> float:
    """Mean absolute correlation between two different dimensions, among those that vary.

    Args:
        feats: shape (N, D).

    Returns:
        Between 0 (decoupled) and 1 (all dimensions say the same); NaN when fewer than two vary.
    """
    z = standardise(feats)
    z = z[:, z.abs().amax(dim=0) > 0]
    dim = z.shape[1]
    if dim < 2:
        return math.nan
    total = (z.T @ z / len(z)).abs().fill_diagonal_(0).sum()
    return float(total) / (dim * (dim - 1))


def save(figure: Figure, path: str | Path, dpi: int = 150) -> None:
    """Writes a figure in the format that its suffix names; a PNG as small as it gets.

    Args:
        figure: one of this module's.
        path: the file, which is replaced at once; its directory is made.
        dpi: dots an inch.
    """
    path = Path(path)
    _take_names_as_they_are(figure)
    if path.suffix != ".png":
        with replacing(path) as file:
            figure.savefig(file, format=path.suffix[1:] or None, dpi=dpi, facecolor="white")
        return
    rendered = BytesIO()
    figure.savefig(rendered, format="png", dpi=dpi, facecolor="white")
    image = Image.open(rendered).convert("RGB")
    # 256 colours are enough for lines and colour maps, and a third of the bytes; not for photographs
    if not any(picture.get_array().ndim == 3 for axes in figure.axes for picture in axes.images):
        image = image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE)
    with replacing(path) as file:
        image.save(file, "PNG", optimize=True, dpi=(dpi, dpi))


def _take_names_as_they_are(figure: Figure) -> None:
    """A class or a run may have dollars in its name, and is not a formula."""
    for text in figure.findobj(Text):
        if "$" in text.get_text() and OF_AN_AXIS not in text.get_text():
            text.set_parse_math(False)


def _two_panels() -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure, panels


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, **style) -> None:
    points = [
        (row.get("epoch", i) + 1, float(row[key]))
        for i, row in enumerate(history)
        if row.get(key) is not None
    ]
    points = [point for point in points if math.isfinite(point[1])]
    if points:
        axes.plot(*zip(*points), marker="." if len(points) < 30 else None, linewidth=1.4, **style)


def _draw_sorted_weights(axes: Axes, final: torch.Tensor) -> torch.Tensor:
    values, order = final.sort()
    axes.plot(range(len(final)), values.numpy(), color=BLUE, linewidth=1.6)
    mean = float(final.mean())
    # A.4.7 of the paper takes the dimensions below the mean for the confounders
    below = int((final < mean).sum())
    shade = f"{below} of {len(final)} below the mean"
    axes.axvspan(0, max(0, below - 1), color=BLUE, alpha=0.1, linewidth=0, label=shade)
    axes.axhline(mean, color=ORANGE, linestyle="--", label=f"mean {mean:.3f}")
    axes.set_title("Weights after training", fontsize=10)
    axes.set(xlabel="dimensions in order of weight", ylabel="mask weight")
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    return order


def standardise(feats: torch.Tensor) -> torch.Tensor:
    """Zero mean and unit variance over the images; dimensions that never vary become 0."""
    feats = feats.detach().double().cpu()
    variance, mean = torch.var_mean(feats, dim=0, correction=0)
    varies = variance > 1e-12 * mean**2  # more than float32 rounds
    return (feats - mean) * varies / torch.where(varies, variance, 1.0).sqrt()


def _class_means(z: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return torch.stack([z[labels == label].mean(dim=0) for label in labels.unique()])


def label_dimensions(axis: Axis, shown: torch.Tensor) -> None:
    """Five ticks with the numbers of the dimensions ``shown``, (d,), of which each has a row or column."""
    places = torch.linspace(0, len(shown) - 1, min(5, len(shown))).round().long().tolist()
    axis.set_ticks(places, labels=[str(int(shown[place])) for place in places])
