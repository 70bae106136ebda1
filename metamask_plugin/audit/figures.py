"""Draws the confounder audit. Colours and axes are those of the package's other figures."""

from typing import Any, Literal

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metamask_plugin.audit.result import AuditResult
from metamask_plugin.audit.statistics import Estimates

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#9B5B9B", "#6F6F6F"


def style_axes(axes: Axes, title: str = "", grid: Literal["both", "x", "y"] = "both", **labels: str) -> Axes:
    """Sets title and labels, takes away the upper and right spine, and draws a faint grid (x, y or both)."""
    axes.set_title(title, fontsize=10)
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    return axes


def legend(axes: Axes, **options) -> None:
    """A small legend without a frame."""
    axes.legend(**{"frameon": False, "fontsize": 8, **options})


def accuracy_name(metric: str) -> str:
    """``knn<k>`` or ``linear`` as the label of an axis."""
    name = "linear probe accuracy" if metric == "linear" else f"kNN accuracy, k = {metric[3:]}"
    return f"{name} (%)"


def audit_figure(result: AuditResult, title: str | None = None) -> Figure:
    """Draws the audit in four panels.

    Dimensions in order of their Banzhaf value with intervals, the harmful ones orange; the same from
    leave-one-out; for random masks their gain on the held-out half over that on the selection half, with the
    best of each rate ringed; accuracy on both halves while the most harmful dimensions are dropped.

    Args:
        result: of :func:`~metamask_plugin.audit.audit`.
        title: above all panels, e.g. the encoder's name.
    """
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    (values, single), (gains, curve) = figure.subplots(2, 2)
    if title:
        figure.suptitle(title, fontsize=11)
    _draw_effects(values, result.effects["banzhaf"].all, result.level)
    values.set_title("Mean effect over random sets of dimensions (Banzhaf)", fontsize=10)
    _draw_effects(single, result.effects["leave_one_out"].all, result.level)
    single.set_title("Effect from the full set (leave one out)", fontsize=10)
    _draw_gains(gains, result)
    _draw_removal(curve, result)
    return figure


def _draw_effects(axes: Axes, effect: Estimates, level: float) -> None:
    order = np.argsort(effect.value, kind="stable")
    value, low, high, significant = (
        part[order] for part in (effect.value, effect.low, effect.high, effect.q <= level)
    )
    harmful, helpful = significant & (value < 0), significant & (value > 0)
    places = np.arange(len(order))
    width = min(3.0, 300 / len(order))
    for chosen, colour, label in (
        (~harmful & ~helpful, GREY, "neither is shown"),
        (helpful, BLUE, "helps"),
        (harmful, ORANGE, "hurts"),
    ):
        if chosen.any():
            axes.vlines(places[chosen], low[chosen], high[chosen], color=colour, alpha=0.35, lw=width)
            label = f"{label} ({chosen.sum()})"
            axes.plot(places[chosen], value[chosen], "o", color=colour, ms=min(4, width + 1), label=label)
    for place in places[harmful][:10]:
        # upright, so that the names of neighbours do not run into each other
        at: dict[str, Any] = {"xy": (place, low[place]), "xytext": (0, -3), "textcoords": "offset points"}
        axes.annotate(str(order[place]), ha="center", va="top", fontsize=7, rotation=90, **at)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.margins(y=0.12)
    style_axes(axes, xlabel="dimensions in order of effect", ylabel="effect (percentage points)")
    legend(axes, loc="upper left", title=f"false-discovery rate {100 * level:g} %", title_fontsize=8)


def _draw_gains(axes: Axes, result: AuditResult) -> None:
    for number, masks in enumerate(result.random):
        # from blue, which drops least, to yellow
        colour = colormaps["viridis"](number / max(1, len(result.random) - 1) * 0.92)
        x, y = (masks.accuracy[half] - result.accuracy[half] for half in ("selection", "held-out"))
        axes.plot(x, y, ".", color=colour, markersize=5, alpha=0.6, mew=0, label=f"{100 * masks.rate:g} %")
        axes.plot(x[masks.best], y[masks.best], "o", markersize=8, mfc="none", mec=colour, mew=1.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1)
    style_axes(
        axes, "Random masks: chosen on one half, counted on the other", ylabel="gain on the held-out half"
    )
    axes.set_xlabel("gain on the selection half (percentage points)")
    if result.random:
        legend(axes, title="masked", title_fontsize=8, markerscale=1.5)


def _draw_removal(axes: Axes, result: AuditResult) -> None:
    removal = result.removal
    marker = "." if len(removal.counts) < 60 else None
    halves = {"selection half": (removal.selection, GREY), "held-out half": (removal.held_out, BLUE)}
    for label, (accuracies, colour) in halves.items():
        axes.plot(removal.counts, accuracies, color=colour, marker=marker, label=label)
    for accuracies, colour in halves.values():
        axes.axhline(accuracies[0], color=colour, linestyle=":", linewidth=1)
    label = f"chosen: {removal.chosen}, held-out gain {removal.held_out_gain}"
    axes.axvline(removal.chosen, color=ORANGE, linestyle="--", linewidth=1.2, label=label)
    title = f"Dropping the most harmful dimensions ({removal.method.replace('_', ' ')})"
    style_axes(axes, title, xlabel="dimensions dropped", ylabel=accuracy_name(result.metric))
    legend(axes, frameon=True, edgecolor="none", framealpha=0.8)
