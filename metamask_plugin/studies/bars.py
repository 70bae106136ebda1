"""Grouped bars: a group for each place, a bar for each series."""

import math
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from metamask_plugin.studies.metric_names import axis_name, number
from metamask_plugin.studies.panels import (
    PAPER,
    SEED,
    Panel,
    Panels,
    colour_of,
    finish,
    label,
    legend,
    share_values,
)
from metamask_plugin.studies.statistics import Entry

HATCHES = ("", "////", "....", "xxxx")
MAX_UPRIGHT_BARS, MAX_UPRIGHT_PLACES, MAX_WORD = 12, 6, 12
"""More bars, or longer words below them, and they lie down, where names and numbers have room."""


def draw_bars(figure: Figure, drawn: Panels) -> None:
    """Upright where there are few and their names short, else lying.

    From 0, unless that would make them all alike: an axis that does not start at 0 says so.
    """
    places, panels = drawn.places, drawn.panels
    count = len(places) * len(drawn.series)
    longest = max((len(word) for place in places for word in label(place).split()), default=0)
    upright = count <= MAX_UPRIGHT_BARS and len(places) <= MAX_UPRIGHT_PLACES and longest <= MAX_WORD
    if upright:
        width, height = max(3.6, 1 + 0.36 * count + 0.35 * len(places)), 3.4
        across = max(1, min(len(panels), int(11 // width)))
    else:
        across = min(len(panels), 2)
        width = 3 + 0.08 * max(len(label(place)) for place in places) / across
        height = 0.8 + max(0.26, 0.12 + 0.16 * len(drawn.series)) * len(places)
    down = math.ceil(len(panels) / across)
    figure.set_size_inches(max(5.4, width * across), height * down + 0.5)
    shared = share_values(drawn)
    share = (
        {"sharey": shared or "none", "sharex": "all"}
        if upright
        else {"sharex": shared or "none", "sharey": "all"}
    )
    grid = figure.subplots(down, across, squeeze=False, **share)
    name = axis_name(drawn.layout["metric"])
    for axes, panel in zip(grid.flat, panels):
        start, end = _limits(panels if shared else [panel])
        _draw_panel(axes, panel, drawn, upright, start)
        finish(axes, panel.title, grid="y" if upright else "x")
        axes.tick_params(axis="x" if upright else "y", length=0)
        ticks = [textwrap.fill(label(place), 14 if upright else 40) for place in places]
        note = f"axis from {start:g}" if start > 0 else ""
        if upright:
            axes.set_xticks(range(len(ticks)), ticks)
            axes.set_ylim(start, end)
            axes.set_ylabel(note, fontsize=8)
        else:
            axes.set_yticks(range(len(ticks)), ticks)
            axes.set_xlim(start, end)
            axes.set_xlabel(note, fontsize=8)
    if not upright:
        grid[0, 0].set_ylim(len(places) - 0.5, -0.5)  # the first on top
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    (figure.supylabel if upright else figure.supxlabel)(name, fontsize=9)

    def bar(i: int) -> Patch:
        return Patch(facecolor=colour_of(i), hatch=HATCHES[i // 8 % 4], edgecolor="white")

    legend(figure, drawn, bar)


def _draw_panel(axes: Axes, panel: Panel, drawn: Panels, upright: bool, start: float) -> None:
    # between two groups a bar's width
    width = max(0.8 / len(drawn.series), 1 / (len(drawn.series) + 1))
    for i, series in enumerate(drawn.series):
        style = {"color": colour_of(i), "hatch": HATCHES[i // 8 % 4], "edgecolor": "white", "linewidth": 0.4}
        for place, value in enumerate(drawn.places):
            entry = panel.entries.get((series, value))
            if entry is None:
                continue
            at = place + (i - (len(drawn.series) - 1) / 2) * width
            (axes.bar if upright else axes.barh)(at, entry["mean"], 0.92 * width, **style)
            _number(axes, at, max(start, 0.0), entry, colour_of(i), upright)
            _draw_over(axes, at, width, entry, panel.paper.get((series, value)), upright)


def _number(axes: Axes, at: float, foot: float, entry: Entry, colour: str, upright: bool) -> None:
    """Writes the mean at the foot of its bar: at the other end it would pass for the paper's number."""
    dark = sum(w * c for w, c in zip((0.3, 0.59, 0.11), to_rgb(colour))) < 0.6
    axes.annotate(
        number(entry["mean"], entry["metric"]),
        (at, foot) if upright else (foot, at),
        xytext=(0, 3) if upright else (3, 0),
        textcoords="offset points",
        ha="center" if upright else "left",
        va="bottom" if upright else "center",
        fontsize=7,
        color="white" if dark else "black",
        bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        zorder=3,
    )


def _draw_over(
    axes: Axes, at: float, width: float, entry: Entry, theirs: float | None, upright: bool
) -> None:
    """Interval, seeds and the paper's number over one bar."""

    def points(places: Sequence[float], values: Sequence[float], **style) -> None:
        axes.plot(*((places, values) if upright else (values, places)), **style)

    if entry["low"] is not None:
        points([at, at], [entry["low"], entry["high"]], color="black", linewidth=1, zorder=4)
        values = list(entry["values"].values())
        step = 0.5 * width / (len(values) - 1)
        points(
            [at + step * (k - (len(values) - 1) / 2) for k in range(len(values))], values, zorder=5, **SEED
        )
    if theirs is not None:
        points([at], [theirs], zorder=6, **PAPER)


def _limits(panels: Sequence[Panel]) -> tuple[float, float]:
    """Of the axis of values: from 0, or below the lowest where all would look alike from there."""
    values = [value for panel in panels for value in panel.values()]
    lowest, highest = min(values), max(values)
    start = min(lowest, 0.0)
    if 0.8 * highest < lowest < highest:
        step = 10.0 ** math.floor(math.log10(highest - lowest))
        start = max(0.0, math.floor((lowest - 0.3 * (highest - lowest)) / step) * step)
    end = max(highest, 0.0)
    room = 0.06 * ((end - start) or 1.0)
    return start - room * (start < 0), end + room
