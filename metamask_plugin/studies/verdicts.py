"""What a study found, a line for each metric."""

from collections.abc import Mapping, Sequence
from typing import Any

from metamask_plugin.studies.metric_names import (
    column_name,
    is_accuracy,
    is_of_the_run,
    metric_name,
    number,
)
from metamask_plugin.studies.statistics import POWER, Entry, columns_of, levels

MAX_NAMED = 4
"""Differences that a line names; the table has all."""


def verdicts(
    pairs: Sequence[Entry], baseline: Mapping[str, Any], metrics: Sequence[str] = (), checkpoint: str = "last"
) -> list[str]:
    """Which differences to the baseline are more than the seeds explain, and what they could have found.

    Args:
        pairs: of :func:`~metamask_plugin.studies.statistics.paired`.
        baseline: that they are differences to.
        metrics: in this order; by default all.
        checkpoint: the epochs that are spoken of.

    Returns:
        A line for each metric on the differences that are clear after the correction for their number, and
        one on the difference that so many seeds can resolve.
    """
    lines = []
    pairs = [entry for entry in pairs if entry["checkpoint"] == checkpoint]
    for metric in metrics or levels(pairs, "metric"):
        entries = [entry for entry in pairs if entry["metric"] == metric]
        if not entries:
            continue
        epoch = "" if is_of_the_run(metric) else f", {column_name('checkpoint', checkpoint)}"
        lines += [f"{metric_name(metric)}{epoch}: {words}." for words in _found(entries, baseline)]
    return lines


def _found(entries: Sequence[Entry], baseline: Mapping[str, Any]) -> list[str]:
    """What is to be said of one metric."""
    other = ", ".join(f"{factor} = {level}" for factor, level in baseline.items())
    judged = [entry for entry in entries if entry["clear"] is not None]
    if not judged:
        return [f"no verdict on the differences to {other}: fewer than two seeds with both sides"]
    varying = [c for c in columns_of(entries) if len(levels(entries, c)) > 1 or c in baseline]
    clear = [entry for entry in judged if entry["clear"]]
    line = f"{len(clear)} of {len(judged)} differences to {other} are clear"
    if len(judged) > 1:
        line += f" after the correction for {len(judged)} comparisons"
    if clear:
        above = sum(entry["mean"] > 0 for entry in clear)
        shown = sorted(clear, key=lambda entry: -abs(entry["mean"]))[:MAX_NAMED]
        line += f", {above} above and {len(clear) - above} below"
        line += ", the largest: " if len(shown) < len(clear) else ": "
        line += "; ".join(_difference(entry, varying) for entry in shown)
    return [line, *_resolvable(judged, varying)]


def _difference(entry: Entry, varying: Sequence[str]) -> str:
    mean, metric = entry["mean"], entry["metric"]
    low, high = (number(entry[key], metric, like=mean, sign=True) for key in ("low", "high"))
    return f"{_title(entry, varying)} {number(mean, metric, sign=True)} [{low}, {high}], n = {entry['n']}"


def _resolvable(judged: Sequence[Entry], varying: Sequence[str]) -> list[str]:
    """The smallest and the largest difference that the seeds can resolve; nothing where no seed matters."""
    least, most = (pick(judged, key=lambda entry: entry["resolvable"]) for pick in (min, max))
    if not most["resolvable"]:
        return []
    unit = " points" if is_accuracy(most["metric"]) else ""
    sizes = [f"{number(entry['resolvable'], entry['metric'])}{unit}" for entry in (least, most)]
    named = sizes[:1]
    if sizes[0] != sizes[1]:
        named = [f"{size} ({_title(entry, varying)})" for size, entry in zip(sizes, (least, most))]
    seeds = sorted(entry["n"] for entry in judged)
    seeds = " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    return [
        f"{seeds} seeds find a difference of {' to '.join(named)} with a probability of "
        f"{100 * POWER:g} %, before the correction"
    ]


def _title(entry: Entry, varying: Sequence[str]) -> str:
    return ", ".join(column_name(c, entry[c]) for c in varying if entry.get(c) is not None)
