"""A study's figures in the forms of the papers: bars, curves, and accuracy over cost.

Built as those of :mod:`~metamask_plugin.evaluation.figures`, whose ``save`` writes them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from metamask_plugin.errors import check, choose
from metamask_plugin.studies.bars import draw_bars
from metamask_plugin.studies.curves import draw_cost, draw_curve
from metamask_plugin.studies.metric_names import axis_name
from metamask_plugin.studies.panels import label, panels_of
from metamask_plugin.studies.statistics import Row

KINDS = {"bars": draw_bars, "curve": draw_curve, "cost": draw_cost}
LAYOUT = ("checkpoint", "kind", "log_x", "metric", "panels", "series", "title", "x")


def draw(
    layout: Mapping[str, Any], rows: Iterable[Row], paper: Sequence[Row], factors: Sequence[str]
) -> Figure:
    """A figure as a layout asks for it.

    Means with their 95 % intervals over seeds, the seeds as points, the paper's numbers as hollow markers.
    What varies and the layout does not name becomes panels: nothing is averaged but seeds and draws.

    Args:
        layout: ``kind`` (``bars``, ``curve`` or ``cost``), ``x``, ``metric``, and maybe ``series``,
            ``panels`` (a column, or several), ``checkpoint`` (by default the last epoch, where there is one),
            ``log_x`` and ``title``. ``x`` and ``series`` are columns of the rows; for ``cost``, ``x`` is a
            metric, such as ``seconds_per_epoch``. A curve over what is not numbers, or over 0 on a log scale,
            has equal steps.
        rows: tidy rows.
        paper: the paper's numbers, see :func:`~metamask_plugin.studies.tables.tables`.
        factors: of the study.

    Raises:
        UserError: for a layout that names what is not there.
    """
    kind = choose("figures.kind", layout.get("kind"), KINDS)
    unknown = sorted(set(layout) - set(LAYOUT))
    check(not unknown, "figures", f"given by {', '.join(LAYOUT)}", ", ".join(unknown))
    drawn = panels_of(layout, list(rows), paper, factors, over_metric=kind == "cost")
    figure = Figure(layout="constrained")
    KINDS[kind](figure, drawn)
    if layout.get("title"):
        figure.suptitle(layout["title"], fontsize=11)
    return figure


def describe(layout: Mapping[str, Any], rows: Iterable[Row], factors: Sequence[str]) -> str:
    """The figure in words, for those who do not see it: what it shows, and every mean.

    Args:
        layout: see :func:`draw`, which checks it.
        rows: tidy rows.
        factors: of the study.
    """
    drawn = panels_of(layout, list(rows), (), factors, over_metric=layout["kind"] == "cost")
    over = axis_name(layout["x"]) if layout["kind"] == "cost" else layout["x"]
    sentences = [f"{axis_name(layout['metric'])} over {over}."]
    for panel in drawn.panels:
        means = []
        for (series, place), entry in panel.entries.items():
            if "cost" in entry:
                place = f"{entry['cost']['mean']:.4g}"
            name = ", ".join(filter(None, (label(series), label(place))))
            means.append(f"{name}: {entry['mean']:.4g}")
        sentences.append(f"{panel.title + ': ' if panel.title else ''}{'; '.join(means)}.")
    return " ".join(sentences)
