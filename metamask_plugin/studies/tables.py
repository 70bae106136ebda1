"""A study's tables, as structures for HTML and as Markdown, and its rows as files."""

import csv
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.studies.metric_names import (
    column_name,
    is_accuracy,
    is_of_the_run,
    metric_name,
    number,
    plain,
)
from metamask_plugin.studies.statistics import Entry, Row, columns_of, levels

LAYOUT = {"rows", "columns", "metric", "metrics", "checkpoint", "title"}
COLUMNS = ("seed", "checkpoint", "metric", "value")
FORMULA = ("=", "+", "-", "@", "\t", "\r")
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """One combination's result.

    Attributes:
        text: ``mean ± half-width (n)``, a mean alone where there is one seed, or a dash.
        mean: the mean, or None.
        paper: the paper's number as text, or None.
        marked: of a summary: the highest accuracy of its column; of differences: it is clear.
    """

    text: str
    mean: float | None = None
    paper: str | None = None
    marked: bool = False


@dataclass(frozen=True)
class Table:
    """A table as it is to be shown; all strings are plain text, not escaped.

    Attributes:
        title: what all its cells have in common.
        corner: what its rows differ by.
        header: lines of (text, number of columns that it spans), the outermost first.
        rows: (label, cells).
        differences: whether the cells are differences to a baseline.
    """

    title: str
    corner: str
    header: tuple[tuple[tuple[str, int], ...], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    differences: bool = False

    @property
    def has_paper(self) -> bool:
        return any(cell.paper for _, cells in self.rows for cell in cells)


def tables(
    layout: Mapping[str, Any],
    summary: Sequence[Entry],
    paper: Sequence[Row] = (),
    factors: Sequence[str] = (),
) -> list[Table]:
    """The tables that a layout asks for.

    What varies and is named neither in ``rows`` nor in ``columns`` makes one table for each of its values, so
    that no two numbers share a cell: the last and the best epoch, for one, unless the layout picks a
    checkpoint. Columns without any number are left out; rows of numbers are in their order.

    Args:
        layout: ``rows`` (a column, or several), ``columns`` (a list, may be missing), ``metric`` or
            ``metrics`` (the innermost columns), ``checkpoint``, ``title``.
        summary: of :func:`~metamask_plugin.studies.statistics.summarise`, or of its ``paired``: then the
            cells are differences, and those that are clear are marked.
        paper: the paper's numbers: ``metric``, ``value``, and the levels that each is of. What a number does
            not name (the checkpoint, for one) it is of all of.
        factors: the study's, which are columns even where no trial is finished.

    Raises:
        UserError: for a layout that names what is not there.
    """
    unknown = sorted(set(layout) - LAYOUT)
    check(not unknown, "tables", f"given by {', '.join(sorted(LAYOUT))}", ", ".join(unknown))
    down, across = _names(layout.get("rows")), _names(layout.get("columns"))
    check(len(down) > 0, "tables", "given with rows: the factor down the side", dict(layout))
    known = [*factors, *columns_of(summary)]
    for column in (*down, *across):
        # with no number there may be columns that only a measure would bring
        choose("tables", column, known if summary else [*known, column])
    metrics = layout.get("metrics") or _names(layout.get("metric"))
    check(len(metrics) > 0, "tables", "given with a metric or metrics", dict(layout))
    entries = [entry for entry in summary if entry["metric"] in metrics]
    if layout.get("checkpoint"):
        entries = [entry for entry in entries if entry["checkpoint"] == layout["checkpoint"]]
    named = [*down, *across, "metric"]
    apart = [c for c in columns_of(entries) if c not in named and _tells_apart(entries, c)]
    found = []
    for values in dict.fromkeys(tuple(entry.get(column) for column in apart) for entry in entries):
        part = [entry for entry in entries if tuple(entry.get(column) for column in apart) == values]
        of_the_run = all(is_of_the_run(entry["metric"]) for entry in part)
        common = [
            column_name(c, v, full=True)
            for c, v in zip(apart, values)
            if v is not None and not (c == "checkpoint" and of_the_run)
        ]
        found.append(_table(layout, part, paper, down, across, metrics, common))
    return found


def markdown(table: Table) -> str:
    """A table in Markdown; its header is one line, the best of a column or a clear difference is bold."""
    names = [" / ".join(filter(None, words)) for words in zip(*(_spread(line) for line in table.header))]
    lines = [[table.corner, *names], ["---"] * (1 + len(names))]
    for label, cells in table.rows:
        texts = [f"**{_escaped(cell.text)}**" if cell.marked else _escaped(cell.text) for cell in cells]
        papers = [f" (paper {_escaped(cell.paper)})" if cell.paper else "" for cell in cells]
        lines.append([_escaped(label), *(text + number for text, number in zip(texts, papers))])
    lines[0] = [_escaped(word) for word in lines[0]]
    body = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{_escaped(table.title)}\n\n{body}\n"


def write_rows(rows: Sequence[Row], folder: str | Path) -> None:
    """Writes ``results.csv`` and ``results.json`` (``{"rows": [...]}``), each at once.

    Args:
        rows: tidy rows. The CSV has the union of their columns, and an empty cell where a row lacks one. A
            text that a spreadsheet would run as a formula has an apostrophe before it there.
        folder: where; it is made.
    """
    folder = Path(folder)
    columns = list(dict.fromkeys(key for row in rows for key in row)) or list(COLUMNS)
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _as_text(cell) for key, cell in row.items()} for row in rows)
    write_whole(folder / "results.csv", text.getvalue())
    write_summary(folder / "results.json", {"rows": list(rows)})


def _as_text(cell: Any) -> Any:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell


def papers_number(paper: Iterable[Row], entry: Row) -> float | None:
    """The paper's number for an entry: the first whose columns all agree with it."""
    for row in paper:
        if all(entry.get(column) == value for column, value in row.items() if column != "value"):
            return float(row["value"])
    return None


def _table(
    layout: Mapping[str, Any],
    entries: Sequence[Entry],
    paper: Sequence[Row],
    down: Sequence[str],
    across: Sequence[str],
    metrics: Sequence[str],
    common: Sequence[str],
) -> Table:
    by_place = {(_at(entry, down), _at(entry, [*across, "metric"])): entry for entry in entries}
    side = list(dict.fromkeys(place for place, _ in by_place))
    if all(isinstance(value, int | float) for label in side for value in label):
        side.sort()
    levels_across = [levels(entries, column) for column in across]
    measured = [metric for metric in metrics if any(entry["metric"] == metric for entry in entries)]
    places = [
        place
        for place in itertools.product(*levels_across, measured)
        if any((label, place) in by_place for label in side)
    ]
    differences = any("clear" in entry for entry in entries)
    best = {} if differences or len(side) < 2 else {place: _best(by_place, side, place) for place in places}
    rows = []
    for label in side:
        found = [by_place.get((label, place)) for place in places]
        cells = tuple(_cell(entry, paper, best.get(place)) for entry, place in zip(found, places))
        rows.append((" / ".join(MISSING if value is None else plain(value) for value in label), cells))
    shared = any(set(one) & set(other) for one, other in itertools.combinations(levels_across, 2))
    words = [[column_name(c, v, full=shared) for c, v in zip([*across, "metric"], place)] for place in places]
    if len(measured) == 1 and across:  # the title has it
        words = [line[:-1] for line in words]
    one = [metric_name(measured[0])] if len(measured) == 1 else []
    title = layout.get("title") or (one[0] if one else "Results")
    return Table(
        title=", ".join([title, *common]),
        corner=" / ".join(down),
        header=_header(words),
        rows=tuple(rows),
        differences=differences,
    )


def _header(words: Sequence[Sequence[str]]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """From the words of each column, outermost first, to lines whose equal neighbours are one cell."""
    lines = []
    for depth in range(len(words[0])):
        # equal words are joined below equal words alone
        runs = itertools.groupby(words, key=lambda column: tuple(column[: depth + 1]))
        lines.append(tuple((key[-1], len(list(columns))) for key, columns in runs))
    return tuple(lines)


def _spread(line: Sequence[tuple[str, int]]) -> list[str]:
    return [text for text, span in line for _ in range(span)]


def _cell(entry: Entry | None, paper: Sequence[Row], best: float | None) -> Cell:
    if entry is None or entry["mean"] is None:
        return Cell(MISSING)
    metric, mean, differs = entry["metric"], entry["mean"], "clear" in entry
    text = number(mean, metric, sign=differs)
    if entry["low"] is not None:
        half = mean - entry["low"]
        text += f" ± {number(half, metric, like=mean)}" if half else ""  # none where seeds change nothing
        text += f" ({entry['n']})"
    theirs = None if differs else papers_number(paper, entry)
    return Cell(
        text=text,
        mean=mean,
        paper=None if theirs is None else number(theirs, metric),
        marked=bool(entry["clear"]) if differs else best is not None and mean == best,
    )


def _best(by_place: Mapping[Any, Entry], side: Sequence[Any], place: tuple[Any, ...]) -> float | None:
    if not is_accuracy(place[-1]):
        return None
    found = [by_place[label, place]["mean"] for label in side if (label, place) in by_place]
    return max((mean for mean in found if mean is not None), default=None)


def _at(entry: Row, columns: Sequence[str]) -> tuple[Any, ...]:
    return tuple(entry.get(column) for column in columns)


def _tells_apart(entries: Sequence[Entry], column: str) -> bool:
    """Whether a column has to be named: the checkpoint always, others where they vary."""
    return column == "checkpoint" or len(levels(entries, column)) > 1


def _names(given: str | Sequence[str] | None) -> list[str]:
    return [] if given is None else [given] if isinstance(given, str) else list(given)


def _escaped(text: str) -> str:
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").split())
