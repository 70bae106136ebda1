"""A metric over a factor, a line for each series; and accuracy over what it costs."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from metamask_plugin.studies.metric_names import axis_name
from metamask_plugin.studies.panels import (
    PAPER,
    SEED,
    Panel,
    Panels,
    colour_of,
    finish,
    label,
    legend,
    marker_of,
    share_values,
)
from metamask_plugin.studies.statistics import Entry

LINES = ("-", "--", ":")
MAX_BANDS = 4
"""More bands hide each other: then intervals are bars."""
MAX_POINTS_SERIES = 8
"""More series, and their seeds' points are a cloud."""
DIRECTIONS = [(math.cos(a), math.sin(a)) for a in np.arange(8) * math.pi / 4 + math.pi / 4]


def draw_curve(figure: Figure, drawn: Panels) -> None:
    """Means with bands (with bars where series are many) and the seeds' points, over ``x``."""
    grid = _grid(figure, drawn, 5.2)
    numbers = all(isinstance(place, int | float) for place in drawn.places)
    log = bool(drawn.layout.get("log_x"))
    even = not numbers or (log and min(drawn.places) <= 0)
    xs = dict(zip(drawn.places, range(len(drawn.places)) if even else drawn.places))
    for axes, panel in zip(grid, drawn.panels):
        if log and not even:
            axes.set_xscale("log")
        for i, series in enumerate(drawn.series):
            _draw_line(axes, panel, drawn, i, series, xs, log and not even)
        finish(axes, panel.title)
        axes.xaxis.set_minor_locator(NullLocator())
        crowded = sum(len(label(place)) + 2 for place in drawn.places) > 45
        axes.set_xticks(list(xs.values()), [label(place) for place in xs])
        axes.tick_params(axis="x", rotation=45 if crowded else 0)
        axes.set_xlabel(str(drawn.layout["x"]), fontsize=9)
    _name_left(figure, drawn)

    def line(i: int) -> Line2D:
        style = {"linestyle": LINES[i // 8 % 3], "marker": marker_of(i), "markersize": 5}
        return Line2D([], [], color=colour_of(i), **style)

    legend(figure, drawn, line)


def draw_cost(figure: Figure, drawn: Panels) -> None:
    """A numbered point for each series, at its cost and its accuracy, with intervals in both directions.

    The paper's accuracies stand at our costs: its own are of other machines.
    """
    grid = _grid(figure, drawn, 5.4)
    for axes, panel in zip(grid, drawn.panels):
        points = []
        for i, series in enumerate(drawn.series):
            entry = panel.entries.get((series, None))
            if entry is None:
                continue
            cost = entry["cost"]
            at = (cost["mean"], entry["mean"])
            points.append((str(i + 1), at, colour_of(i)))
            style = {"color": colour_of(i), "zorder": 3}
            bars = {"xerr": _half(cost), "yerr": _half(entry)}
            axes.errorbar(*at, **bars, marker=marker_of(i), markersize=6, elinewidth=1, capsize=2, **style)
            theirs = panel.paper.get((series, None))
            if theirs is not None:
                axes.plot(at[0], theirs, zorder=4, **PAPER | {"color": colour_of(i)})
        finish(axes, panel.title)
        axes.margins(0.1)
        axes.set_xlabel(axis_name(drawn.layout["x"]), fontsize=9)
        _number(figure, axes, points)
    _name_left(figure, drawn)

    def point(i: int) -> Line2D:
        return Line2D([], [], color=colour_of(i), linestyle="none", marker=marker_of(i))

    legend(figure, drawn, point, numbered=True)


def _grid(figure: Figure, drawn: Panels, width: float) -> list[Axes]:
    count = len(drawn.panels)
    across = min(count, 2)
    down = math.ceil(count / across)
    figure.set_size_inches(width * across, 3.7 * down)
    grid = figure.subplots(down, across, squeeze=False, sharey=share_values(drawn))
    for axes in grid.flat[count:]:
        axes.set_visible(False)
    return list(grid.flat)


def _name_left(figure: Figure, drawn: Panels) -> None:
    figure.supylabel(axis_name(drawn.layout["metric"]), fontsize=9)


def _draw_line(
    axes: Axes, panel: Panel, drawn: Panels, i: int, series: Any, xs: dict[Any, float], log: bool
) -> None:
    found = [(xs[place], panel.entries[series, place]) for place in xs if (series, place) in panel.entries]
    if not found:
        return
    at = [x for x, _ in found]
    colour = colour_of(i)
    style = {"color": colour, "linestyle": LINES[i // 8 % 3], "linewidth": 1.5}
    axes.plot(
        at, [entry["mean"] for _, entry in found], marker=marker_of(i), markersize=4.5, zorder=3, **style
    )
    spread = [(x, entry) for x, entry in found if entry["low"] is not None]
    if spread and len(drawn.series) <= MAX_BANDS and len(spread) == len(found) > 1:
        band = ([entry[end] for _, entry in spread] for end in ("low", "high"))
        axes.fill_between(at, *band, color=colour, alpha=0.13, linewidth=0)
    else:
        for x, entry in spread:
            axes.plot([x, x], [entry["low"], entry["high"]], color=colour, linewidth=0.9, alpha=0.7)
    if len(drawn.series) <= MAX_POINTS_SERIES:
        for x, entry in spread:
            values = list(entry["values"].values())
            axes.plot([x] * len(values), values, zorder=4, **SEED | {"color": colour, "alpha": 0.6})
    theirs = [(x, panel.paper[series, p]) for p, x in xs.items() if (series, p) in panel.paper]
    if theirs:
        mark = PAPER | {"color": colour, "linestyle": (0, (1, 3)), "linewidth": 1}
        axes.plot(*zip(*theirs), zorder=5, **mark)


def _half(entry: Entry) -> float | None:
    return None if entry["low"] is None else entry["high"] - entry["mean"]


def _number(figure: Figure, axes: Axes, points: list[tuple[str, tuple[float, float], str]]) -> None:
    """Writes each point's number beside it, where the other points and numbers leave most room."""
    axes.autoscale_view()
    places = axes.transData.transform([at for _, at, _ in points]) * 72 / figure.dpi
    taken = [tuple(place) for place in places]
    for (text, at, colour), (x, y) in zip(points, places):
        free = []
        for radius in (10, 18):
            for dx, dy in DIRECTIONS:
                spot = (x + radius * dx, y + radius * dy)
                room = min(math.dist(spot, other) for other in taken if other != spot)
                free.append((min(room, 10) - 0.1 * radius, (radius * dx, radius * dy), spot))
        _, offset, spot = max(free, key=lambda choice: choice[0])
        taken.append(spot)
        far = (
            {"arrowprops": {"arrowstyle": "-", "linewidth": 0.5, "color": "#666666"}}
            if math.hypot(*offset) > 12
            else {}
        )
        centre = {"ha": "center", "va": "center", "fontsize": 8, "zorder": 7, "color": colour}
        axes.annotate(text, at, offset, textcoords="offset points", **centre, **far)
