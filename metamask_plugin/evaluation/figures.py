"""Draws a training: its curves and its mask; writes figures to files.

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
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator
from PIL import Image

from metamask_plugin.audit.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, legend, style_axes
from metamask_plugin.errors import check
from metamask_plugin.evaluation.files import replacing

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
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    for key, (label, colour) in LOSSES.items():
        _curve(losses, history, key, label=label, color=colour)
    _curve(losses, [_before(row) for row in history], "before", label=BEFORE, color=GREEN, linestyle=":")
    values = [value for line in losses.lines for value in line.get_ydata()]
    # the redundancy loss starts orders of magnitude above the others; the uniformity loss is a logarithm and
    # may be 0 or below, where there is no log scale
    if values and 0 < 10 * min(values) < max(values):
        losses.set_yscale("log")
    style_axes(losses, "Losses", xlabel="epoch", ylabel="mean over the epoch")
    for key, (label, colour, style) in ACCURACIES.items():
        _curve(accuracies, history, key, label=label, color=colour, linestyle=style)
    style_axes(accuracies, "Nearest-neighbour accuracy", xlabel="epoch", ylabel="test accuracy (%)")
    for axes in (losses, accuracies):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        if axes.lines:
            legend(axes)
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
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    ordered, moving = figure.subplots(1, 2)
    order = _draw_sorted_weights(ordered, final)
    epochs = range(1, len(history) + 1)
    band = (history.amin(dim=1).numpy(), history.amax(dim=1).numpy())
    moving.fill_between(epochs, *band, color=GREY, alpha=0.18, linewidth=0, label="smallest to largest")
    drawn = torch.linspace(0, len(final) - 1, min(len(final), MAX_TRAJECTORIES)).round().long()
    marker = "." if len(history) == 1 else None
    for rank in drawn.tolist():
        colour = colormaps["viridis"](rank / max(1, len(final) - 1))
        moving.plot(epochs, history[:, order[rank]].numpy(), color=colour, lw=0.7, alpha=0.75, marker=marker)
    mean = history.mean(dim=1).numpy()
    moving.plot(epochs, mean, color=ORANGE, linestyle="--", label="mean", marker=marker)
    style_axes(moving, "Weights over the epochs", xlabel="epoch", ylabel="mask weight")
    moving.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    legend(moving, loc="upper left")
    return figure


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


def _curve(axes: Axes, history: Sequence[Mapping[str, Any]], key: str, **style) -> None:
    points = [(row.get("epoch", i) + 1, row.get(key)) for i, row in enumerate(history)]
    points = [(x, float(y)) for x, y in points if y is not None and math.isfinite(float(y))]
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
    style_axes(axes, "Weights after training", xlabel="dimensions in order of weight", ylabel="mask weight")
    legend(axes, loc="upper left")
    return order
