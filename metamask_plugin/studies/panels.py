"""What the panels of a study's figure show, and what all kinds of figures share: colours, axes, legend."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from metamask_plugin.audit.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, style_axes
from metamask_plugin.errors import check, choose
from metamask_plugin.studies.metric_names import column_name, plain
from metamask_plugin.studies.statistics import Entry, Row, columns_of, levels, summarise
from metamask_plugin.studies.tables import papers_number

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#E69F00", "#56B4E9", GREY, "#7A3B00")
"""After eight series they begin anew, with other lines, markers and hatching."""
MARKERS = "osD^vP*X"
PAPER = {"linestyle": "none", "marker": "D", "color": "black", "markerfacecolor": "white", "markersize": 5}
SEED = {"linestyle": "none", "marker": "o", "color": "#222222", "markeredgecolor": "white"}
SEED |= {"markeredgewidth": 0.5, "markersize": 3.6}

MAX_LEGEND_WORDS = 110
"""Characters of a legend above the panels; a longer one stands beside them."""


@dataclass(frozen=True)
class Panel:
    """What one panel shows.

    Attributes:
        title: what its entries have in common and those of other panels have not.
        entries: with a mean, by (series, place): the values of the layout's ``series`` and ``x``.
        paper: the paper's numbers, likewise.
    """

    title: str
    entries: Mapping[tuple[Any, Any], Entry]
    paper: Mapping[tuple[Any, Any], float]

    def values(self) -> list[float]:
        """All that has to fit on the axis of values: means, seeds, ends of intervals, the paper's numbers."""
        found = list(self.paper.values())
        for entry in self.entries.values():
            ends = () if entry["low"] is None else (entry["low"], entry["high"])
            found += [entry["mean"], *entry["values"].values(), *ends]
        return found


@dataclass(frozen=True)
class Panels:
    """All panels of a figure.

    Attributes:
        layout: of the figure.
        series: the values of its ``series`` over all panels; ``(None,)`` without one.
        places: the values of its ``x``, those that are numbers in their order; ``(None,)`` for costs.
        panels: the panels.
    """

    layout: Mapping[str, Any]
    series: tuple[Any, ...]
    places: tuple[Any, ...]
    panels: tuple[Panel, ...]

    @property
    def has_paper(self) -> bool:
        return any(panel.paper for panel in self.panels)

    @property
    def has_intervals(self) -> bool:
        return any(entry["n"] > 1 for panel in self.panels for entry in panel.entries.values())


def panels_of(
    layout: Mapping[str, Any],
    rows: Sequence[Row],
    paper: Sequence[Row],
    factors: Sequence[str],
    over_metric: bool = False,
) -> Panels:
    """Sorts a study's rows into panels, series and places.

    Args:
        layout: see :func:`~metamask_plugin.studies.figures.draw`.
        rows: tidy rows.
        paper: the paper's numbers.
        factors: of the study.
        over_metric: whether ``x`` is a metric; its entry is then beside each entry, under ``cost``.

    Raises:
        UserError: for a layout that names what is not there.
    """
    known = [*factors, *columns_of(rows)]
    metrics = levels(rows, "metric")
    metric = choose("figures.metric", layout.get("metric"), metrics)
    x, series = layout.get("x"), layout.get("series")
    choose("figures.x", x, metrics if over_metric else known)
    given = layout.get("panels") or ()
    beside = [given] if isinstance(given, str) else list(given)
    for name, column in [("series", series)] * (series is not None) + [("panels", c) for c in beside]:
        choose(f"figures.{name}", column, known)
    entries = [entry for entry in summarise(rows, factors) if entry["mean"] is not None]
    costs = (
        {_factors(entry, factors): entry for entry in entries if entry["metric"] == x} if over_metric else {}
    )
    entries = [entry for entry in entries if entry["metric"] == metric]
    epochs = levels(entries, "checkpoint")
    epoch = layout.get("checkpoint") or ("last" if "last" in epochs else next(iter(epochs), None))
    entries = [entry for entry in entries if entry["checkpoint"] == epoch]
    if over_metric:
        entries = [
            entry | {"cost": costs[_factors(entry, factors)]}
            for entry in entries
            if _factors(entry, factors) in costs
        ]
    check(len(entries) > 0, "figures", f"of finite values, for {metric} at the {epoch} epoch", "none")
    named = (x, series, "metric", "checkpoint")
    columns = [c for c in columns_of(entries) if c not in (*named, "cost")]
    beside += [c for c in columns if c not in beside and len(levels(entries, c)) > 1]
    drawn = []
    for values in dict.fromkeys(tuple(entry.get(column) for column in beside) for entry in entries):
        part = {
            (entry.get(series), None if over_metric else entry.get(x)): entry
            for entry in entries
            if tuple(entry.get(column) for column in beside) == values
        }
        theirs = {key: papers_number(paper, entry) for key, entry in part.items()}
        title = ", ".join(filter(None, (column_name(c, v, full=True) for c, v in zip(beside, values))))
        drawn.append(Panel(title, part, {k: value for k, value in theirs.items() if value is not None}))
    names = dict.fromkeys(name for panel in drawn for name, _ in panel.entries)
    places = list(dict.fromkeys(place for panel in drawn for _, place in panel.entries))
    if all(isinstance(place, int | float) for place in places):
        places.sort()
    return Panels(layout, tuple(names), tuple(places), tuple(drawn))


def label(value: Any) -> str:
    """A level as text; nothing for what has none."""
    return "" if value is None else plain(value)


def colour_of(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def marker_of(index: int) -> str:
    # shifted at each round through the colours, so that no pair returns before the 64th
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]


def finish(axes: Axes, title: str, grid: str = "both") -> None:
    """What all panels look like."""
    style_axes(axes, title, grid)
    axes.tick_params(labelsize=8)


def share_values(drawn: Panels) -> bool:
    """Whether the panels are near enough to each other for one scale, which is easier to compare by."""
    highest = [max(panel.values()) for panel in drawn.panels]
    return min(highest) > 0.7 * max(highest)


def legend(figure: Figure, drawn: Panels, handle: Callable[[int], Artist], numbered: bool = False) -> None:
    """Above the panels, or beside them where it is long; with what points and hollow markers are.

    Args:
        figure: with its panels drawn; grows for a legend beside them.
        drawn: what the panels show.
        handle: of a series, by its number.
        numbered: whether the series are numbered points; then their seeds are not drawn.
    """
    handles = []
    for i, series in enumerate(drawn.series):
        if series is not None:
            # a number comes with what it is of
            name = column_name(str(drawn.layout["series"]), series)
            handles.append(handle(i))
            handles[-1].set_label(f"{i + 1}  {name}" if numbered else name)
    if drawn.has_intervals:
        bar = {"linestyle": "none", "marker": "|", "markersize": 9, "color": "black"}
        handles.append(Line2D([], [], label="95 % interval", **bar))
        if not numbered:
            handles.append(Line2D([], [], label="a seed", **SEED))
    if drawn.has_paper:
        handles.append(Line2D([], [], label="the paper's number", **PAPER))
    if not handles:
        return
    words = sum(len(handle.get_label()) + 5 for handle in handles)
    style = {"frameon": False, "fontsize": 8}
    if words > MAX_LEGEND_WORDS or len(handles) > 8:
        longest = max(len(handle.get_label()) for handle in handles)
        figure.set_size_inches(figure.get_figwidth() + 0.6 + 0.065 * longest, figure.get_figheight())
        figure.legend(handles=handles, loc="outside right center", **style)
    elif words <= 13 * figure.get_figwidth():
        figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), **style)
    else:
        room = max(
            1, int(figure.get_figwidth() * 13 // max(len(handle.get_label()) + 6 for handle in handles))
        )
        figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), room), **style)


def _factors(entry: Row, factors: Sequence[str]) -> tuple[Any, ...]:
    return tuple(entry.get(factor) for factor in factors)
