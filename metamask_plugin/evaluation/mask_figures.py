"""Draws masks on frozen features in the form of MetaMask's Figs. 2, 8 and 9.

Points are tidy rows: ``rate``, ``draw``, ``metric``, ``value``, and maybe ``encoder``. Those of rate 0 are
the unmasked accuracy; several of them, of seeds, are averaged.

[0] Li et al., *MetaMask*, NeurIPS 2022, Figs. 2, 8, 9.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metamask_plugin.audit.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, accuracy_name, legend, style_axes
from metamask_plugin.errors import check

Rows = Sequence[Mapping[str, Any]]

RED = "#C8102E"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY)
MAX_COLUMNS = 3
# labels of more rates would run into each other
MAX_LABELS = 12


def random_mask_scatter(rows: Rows) -> Figure:
    """Accuracy over the mask rate, a point a mask, the unmasked accuracy as a red dashed line, after Fig. 2.

    Args:
        rows: of one metric; each encoder has a panel.

    Raises:
        UserError: without points or without an unmasked accuracy.
    """
    encoders = _by_encoder_and_rate(rows)
    columns = min(MAX_COLUMNS, len(encoders))
    lines = -(-len(encoders) // columns)
    figure = Figure(figsize=(0.6 + 4.4 * columns, 3.4 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, (name, points) in zip(grid, encoders.items()):
        unmasked = _unmasked(name, points)
        _draw_rates(axes, {rate: values for rate, values in points.items() if rate > 0}, BLUE)
        axes.axhline(unmasked, color=RED, linestyle="--", linewidth=1.3, label=f"unmasked {unmasked:.2f} %")
        style_axes(axes, name, xlabel="share of dimensions masked", ylabel=accuracy_name(rows[0]["metric"]))
        legend(axes)
    for axes in grid[len(encoders) :]:
        axes.set_axis_off()
    return figure


def encoder_scatter(rows: Rows, rate: float = 0.05) -> Figure:
    """Masks of one rate on encoders side by side, with their unmasked accuracies, after Fig. 8.

    Args:
        rows: of one metric and two or more encoders.
        rate: the mask rate to draw.

    Raises:
        UserError: without masks of that rate, or without an unmasked accuracy.
    """
    encoders = _by_encoder_and_rate(rows)
    figure = Figure(figsize=(1.6 + 1.7 * max(2, len(encoders)), 3.6), layout="constrained")
    axes, ticks = figure.subplots(), []
    for place, (name, points) in enumerate(encoders.items()):
        check(rate in points, f"masks of {name}", f"some of rate {rate}", sorted(points))
        values = points[rate]
        _draw_points(axes, place, values, COLOURS[place % len(COLOURS)], markersize=4.5, alpha=0.75)
        line = {"color": RED, "linestyle": "--", "linewidth": 1.3, "label": "_" * (place > 0) + "unmasked"}
        axes.hlines(_unmasked(name, points), place - 0.4, place + 0.4, **line)
        ticks.append(f"{name}\n{min(values):.2f} to {max(values):.2f}")
    axes.set_xticks(range(len(encoders)), ticks, fontsize=8)
    axes.set_xlim(-0.6, len(encoders) - 0.4)
    style_axes(axes, f"Random masks of {100 * rate:g} %", ylabel=accuracy_name(rows[0]["metric"]))
    legend(axes)
    return figure


def confounder_scatter(rows: Rows) -> Figure:
    """Masks among the dimensions of low learned weight, after Fig. 9: 0 % boxed red, 100 % boxed blue.

    Args:
        rows: of one metric; the rates are shares of the dimensions below the mean weight.

    Raises:
        UserError: without points.
    """
    points: dict[float, list[float]] = {}
    for of_encoder in _by_encoder_and_rate(rows).values():
        for rate, values in of_encoder.items():
            points.setdefault(rate, []).extend(values)
    figure = Figure(figsize=(max(5.0, 1.6 + 0.5 * len(points)), 3.6), layout="constrained")
    axes = figure.subplots()
    rates = _draw_rates(axes, points, GREY)
    box = {"marker": "s", "markersize": 11, "fillstyle": "none", "linestyle": "none", "mew": 1.6}
    for rate, colour, label in ((0.0, RED, "unmasked"), (1.0, BLUE, "all of them masked")):
        if rate in points:
            place = [rates.index(rate)] * len(points[rate])
            axes.plot(place, points[rate], color=colour, label=label, **box)
    title = "Masks among the dimensions below the mean weight"
    style_axes(
        axes, title, xlabel="share of those dimensions masked", ylabel=accuracy_name(rows[0]["metric"])
    )
    legend(axes)
    return figure


def _by_encoder_and_rate(rows: Rows) -> dict[str, dict[float, list[float]]]:
    metrics = sorted({row["metric"] for row in rows})
    check(len(metrics) == 1, "rows", "of one metric", metrics, "draw a figure for each")
    encoders: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        rates = encoders.setdefault(str(row.get("encoder", "")), {})
        rates.setdefault(float(row["rate"]), []).append(float(row["value"]))
    return encoders


def _unmasked(name: str, points: Mapping[float, Sequence[float]]) -> float:
    check(0.0 in points, f"rows of {name or 'the encoder'}", "with its unmasked accuracy, at rate 0", "none")
    return float(np.mean(points[0.0]))


def _draw_rates(axes: Axes, points: Mapping[float, Sequence[float]], colour: str) -> list[float]:
    """Draws the points of each rate at an equal step; returns the rates in that order."""
    rates = sorted(points)
    for place, rate in enumerate(rates):
        _draw_points(axes, place, points[rate], colour, markersize=3.5, alpha=0.6)
    shown = range(0, len(rates), -(-len(rates) // MAX_LABELS) or 1)
    axes.set_xticks(list(shown), [f"{100 * rates[place]:g} %" for place in shown], fontsize=8)
    axes.set_xlim(-0.6, len(rates) - 0.4)
    return rates


def _draw_points(axes: Axes, place: int, values: Sequence[float], colour: str, **style: float) -> None:
    """Spreads points evenly over half a step, in an order that is the same for every figure."""
    offsets = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else np.zeros(1)
    x = place + np.random.default_rng(0).permutation(offsets)
    axes.plot(x, values, "o", color=colour, markeredgewidth=0, **style)
