"""Pictures of masks on frozen features, in the form of MetaMask's Figs. 2, 8 and 9, and of the audit.

Built as those of :mod:`~metamask_plugin.evaluation.figures`, whose ``save`` writes them. Points are tidy
rows: ``rate``, ``draw``, ``metric``, ``value``, maybe ``split``, and a column that names the encoder.

[0] Li et al., *MetaMask*, NeurIPS 2022, Figs. 2, 8, 9.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from metamask_plugin.errors import check
from metamask_plugin.evaluation.audit_result import AuditResult
from metamask_plugin.evaluation.figures import BLUE, GREEN, GREY, ORANGE, PURPLE

Rows = Sequence[Mapping[str, Any]]

RED = "#C8102E"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
# points of one rate spread over this share of the distance to the next
SPREAD = 0.5
MAX_COLUMNS = 3
# labels of more rates would run into each other
MAX_LABELS = 12


def random_mask_scatter(rows: Rows, panel: str | None = "encoder", split: str = "all") -> Figure:
    """Accuracy over the mask rate, a point a mask, the unmasked accuracy as a red dashed line, after Fig. 2.

    Args:
        rows: tidy rows; those with rate 0 are the unmasked accuracy, several (of seeds) are averaged.
        panel: the column that decides the panel; None, or rows without it, is one panel.
        split: which rows of those with a ``split`` to draw.

    Raises:
        UserError: without points or without an unmasked accuracy.
    """
    panels = _by(_of_split(rows, split), panel)
    columns = min(MAX_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(0.6 + 4.4 * columns, 3.4 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False).flat
    for axes, (name, points) in zip(grid, panels.items()):
        rates = _rates(points)
        _draw_rates(axes, [_values(points, rate) for rate in rates], rates, BLUE)
        _baseline(axes, points, name)
        _finish(axes, name, _metric(points))
        axes.set_xlabel("share of dimensions masked")
        axes.legend(frameon=False, fontsize=8, loc="best")
    for axes in list(grid)[len(panels) :]:
        axes.set_axis_off()
    return figure


def encoder_scatter(rows: Rows, rate: float = 0.05, by: str = "encoder", split: str = "all") -> Figure:
    """Masks of one rate on encoders side by side, with their unmasked accuracies, after Fig. 8.

    Args:
        rows: tidy rows of two or more encoders; those with rate 0 are the unmasked accuracy.
        rate: the mask rate to draw.
        by: the column that names the encoder.
        split: which rows of those with a ``split`` to draw.

    Raises:
        UserError: without masks of that rate, or without an unmasked accuracy.
    """
    encoders = _by(_of_split(rows, split), by)
    figure = Figure(figsize=(1.6 + 1.7 * max(2, len(encoders)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    ticks = []
    for place, (name, points) in enumerate(encoders.items()):
        values = _values(points, rate)
        check(len(values) > 0, f"masks of {name}", f"some of rate {rate}", _rates(points))
        unmasked = _values(points, 0.0)
        check(len(unmasked) > 0, f"rows of {name}", "with its unmasked accuracy, at rate 0", "none")
        colour = COLOURS[place % len(COLOURS)]
        axes.plot(place + _jitter(len(values)), values, "o", markersize=4.5, alpha=0.75, color=colour, mew=0)
        label = "unmasked" if not place else None
        axes.hlines(
            np.mean(unmasked), place - 0.4, place + 0.4, color=RED, linestyle="--", linewidth=1.3, label=label
        )
        ticks.append(f"{name}\n{min(values):.2f} to {max(values):.2f}")
    axes.set_xticks(range(len(encoders)), ticks, fontsize=8)
    axes.set_xlim(-0.6, len(encoders) - 0.4)
    _finish(axes, f"Random masks of {100 * rate:g} %", _metric(rows))
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def confounder_scatter(rows: Rows, alone: Mapping[str, float] | None = None, split: str = "all") -> Figure:
    """Masks among the dimensions of low learned weight, after Fig. 9: 0 % boxed red, 100 % boxed blue.

    Args:
        rows: tidy rows of one encoder; the rates are shares of the dimensions below the mean weight.
        alone: further accuracies to write into the corner, by what they are of.
        split: which rows of those with a ``split`` to draw.

    Raises:
        UserError: without points.
    """
    points = _of_split(rows, split)
    rates = _rates(points, unmasked=True)
    figure = Figure(figsize=(max(5.0, 1.6 + 0.5 * len(rates)), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _draw_rates(axes, [_values(points, rate) for rate in rates], rates, GREY)
    box = {"marker": "s", "markersize": 11, "fillstyle": "none", "linestyle": "none", "mew": 1.6}
    for rate, colour, label in ((0.0, RED, "unmasked"), (1.0, BLUE, "all of them masked")):
        if rate in rates:
            values = _values(points, rate)
            axes.plot([rates.index(rate)] * len(values), values, color=colour, label=label, **box)
    _finish(axes, "Masks among the dimensions below the mean weight", _metric(points))
    axes.set_xlabel("share of those dimensions masked")
    if alone:
        text = "\n".join(f"{name}: {value:.2f} %" for name, value in alone.items())
        axes.text(0.02, 0.03, text, transform=axes.transAxes, fontsize=8, va="bottom", color="#333333")
    axes.legend(frameon=False, fontsize=8, loc="best")
    return figure


def audit_figure(result: AuditResult, title: str | None = None) -> Figure:
    """The audit in four panels.

    Dimensions in order of their Banzhaf value with intervals, the harmful ones orange; the same from
    leave-one-out; for random masks their gain on the held-out half over that on the selection half, with the
    best of each rate ringed; accuracy on both halves while the most harmful dimensions are dropped.

    Args:
        result: of :func:`~metamask_plugin.evaluation.audit.audit`.
        title: above all panels, e.g. the encoder's name.
    """
    figure = Figure(figsize=(10.5, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    (values, single), (gains, curve) = figure.subplots(2, 2)
    if title:
        figure.suptitle(title, fontsize=11)
    _draw_effects(values, result.effects["banzhaf"].all, result.level)
    _finish(values, "Mean effect over random sets of dimensions (Banzhaf)", "effect (percentage points)")
    _draw_effects(single, result.effects["leave_one_out"].all, result.level)
    _finish(single, "Effect from the full set (leave one out)", "effect (percentage points)")
    _draw_gains(gains, result)
    _finish(gains, "Random masks: chosen on one half, counted on the other", "gain on the held-out half")
    _draw_removal(curve, result)
    _finish(curve, f"Dropping the most harmful dimensions ({result.removal.method.replace('_', ' ')})", None)
    curve.set_ylabel(f"{_metric_name(result.metric)} (%)")
    return figure


def _draw_effects(axes: Axes, effect: Any, level: float) -> None:
    order = np.argsort(effect.value, kind="stable")
    harmful = (effect.q[order] <= level) & (effect.value[order] < 0)
    helpful = (effect.q[order] <= level) & (effect.value[order] > 0)
    places = np.arange(len(order))
    width = min(3.0, 300 / len(order))
    for chosen, colour, label in (
        (~harmful & ~helpful, GREY, "neither is shown"),
        (helpful, BLUE, "helps"),
        (harmful, ORANGE, "hurts"),
    ):
        if chosen.any():
            of = order[chosen]
            axes.vlines(places[chosen], effect.low[of], effect.high[of], color=colour, alpha=0.35, lw=width)
            label = f"{label} ({int(chosen.sum())})"
            axes.plot(
                places[chosen], effect.value[of], "o", color=colour, markersize=min(4, width + 1), label=label
            )
    for place in places[harmful][:10]:
        at = (place, effect.low[order[place]])
        # upright, so that the names of neighbours do not run into each other
        style = {"ha": "center", "va": "top", "fontsize": 7, "rotation": 90}
        axes.annotate(str(int(order[place])), at, (0, -3), textcoords="offset points", **style)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("dimensions in order of effect")
    axes.margins(y=0.12)
    title = f"false-discovery rate {100 * level:g} %"
    axes.legend(frameon=False, fontsize=8, loc="upper left", title=title, title_fontsize=8)


def _draw_gains(axes: Axes, result: AuditResult) -> None:
    base = result.accuracy
    for number, masks in enumerate(result.random):
        colour = colormaps["viridis"](number / max(1, len(result.random) - 1) * 0.92)
        x = masks.accuracy["selection"] - base["selection"]
        y = masks.accuracy["held-out"] - base["held-out"]
        # from blue, which drops least, to yellow
        axes.plot(x, y, ".", color=colour, markersize=5, alpha=0.6, mew=0, label=f"{100 * masks.rate:g} %")
        axes.plot(x[masks.best], y[masks.best], "o", markersize=8, mfc="none", mec=colour, mew=1.5)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.axline((0, 0), slope=1, color=GREY, linestyle=":", linewidth=1)
    axes.set_xlabel("gain on the selection half (percentage points)")
    if result.random:
        axes.legend(frameon=False, fontsize=8, title="masked", title_fontsize=8, markerscale=1.5)


def _draw_removal(axes: Axes, result: AuditResult) -> None:
    removal = result.removal
    marker = "." if len(removal.counts) < 60 else None
    axes.plot(removal.counts, removal.selection, color=GREY, marker=marker, label="selection half")
    axes.plot(removal.counts, removal.held_out, color=BLUE, marker=marker, label="held-out half")
    for accuracies, colour in ((removal.selection, GREY), (removal.held_out, BLUE)):
        axes.axhline(accuracies[0], color=colour, linestyle=":", linewidth=1)
    gain = removal.held_out_gain
    label = f"chosen: {removal.chosen}, held-out gain {gain}"
    axes.axvline(removal.chosen, color=ORANGE, linestyle="--", linewidth=1.2, label=label)
    axes.set_xlabel("dimensions dropped")
    axes.legend(fontsize=8, loc="best", edgecolor="none", framealpha=0.8)


def _of_split(rows: Rows, split: str) -> Rows:
    chosen = [row for row in rows if row.get("split", split) == split]
    found = sorted({str(row.get("split")) for row in rows})
    check(len(chosen) > 0, "rows", f"at least one of the split {split!r}", found)
    metrics = sorted({row["metric"] for row in chosen})
    check(len(metrics) == 1, "rows", "of one metric", metrics, "draw a figure for each")
    return chosen


def _by(rows: Rows, column: str | None) -> dict[str, Rows]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(str(row.get(column, "")), []).append(row)
    return groups


def _rates(points: Rows, unmasked: bool = False) -> list[float]:
    return sorted({float(row["rate"]) for row in points if unmasked or row["rate"] > 0})


def _values(points: Rows, rate: float) -> list[float]:
    return [float(row["value"]) for row in points if abs(row["rate"] - rate) < 1e-9]


def _jitter(count: int) -> np.ndarray:
    # evenly in an order that is the same for every figure, so that neighbours do not hide each other
    return np.random.default_rng(0).permutation(np.linspace(-1, 1, count) if count > 1 else [0]) * SPREAD / 2


def _draw_rates(axes: Axes, groups: Sequence[Sequence[float]], rates: Sequence[float], colour: str) -> None:
    for place, values in enumerate(groups):
        axes.plot(place + _jitter(len(values)), values, "o", color=colour, markersize=3.5, alpha=0.6, mew=0)
    step = -(-len(rates) // MAX_LABELS)
    shown = range(0, len(rates), step)
    axes.set_xticks(list(shown), [f"{100 * rates[place]:g} %" for place in shown], fontsize=8)
    axes.set_xlim(-0.6, len(rates) - 0.4)


def _baseline(axes: Axes, points: Rows, name: str) -> None:
    unmasked = _values(points, 0.0)
    check(
        len(unmasked) > 0, f"rows of {name or 'the encoder'}", "with its unmasked accuracy, at rate 0", "none"
    )
    value = float(np.mean(unmasked))
    axes.axhline(value, color=RED, linestyle="--", linewidth=1.3, label=f"unmasked {value:.2f} %")


def _metric(points: Rows) -> str:
    return f"{_metric_name(points[0]['metric'])} (%)"


def _metric_name(metric: str) -> str:
    return "linear probe accuracy" if metric == "linear" else f"kNN accuracy, k = {metric[3:]}"


def _finish(axes: Axes, title: str, ylabel: str | None) -> None:
    axes.set_title(title, fontsize=10)
    if ylabel:
        axes.set_ylabel(ylabel)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
