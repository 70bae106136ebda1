"""What a study found, a line for each metric."""

from collections.abc import Mapping, Sequence
from typing import Any

from metamask_plugin.studies.metric_names import column_name, is_of_the_run, metric_name, number
from metamask_plugin.studies.statistics import LEVEL, Entry, columns_of, levels

MAX_NAMED = 4
"""Differences that a line names; the table has all."""


def verdicts(
    pairs: Sequence[Entry], baseline: Mapping[str, Any], metrics: Sequence[str] = (), checkpoint: str = "last"
) -> list[str]:
    """Which differences to the baseline are more than the seeds explain.

    Args:
        pairs: of :func:`~metamask_plugin.studies.statistics.paired`.
        baseline: that they are differences to.
        metrics: in this order; by default all.
        checkpoint: the epochs that are spoken of.

    Returns:
        A line for each metric; with how many of as many intervals leave 0 out by chance alone.
    """
    lines = []
    other = ", ".join(f"{factor} = {level}" for factor, level in baseline.items())
    pairs = [entry for entry in pairs if entry["checkpoint"] == checkpoint]
    for metric in metrics or levels(pairs, "metric"):
        entries = [entry for entry in pairs if entry["metric"] == metric]
        judged = [entry for entry in entries if entry["outside"] is not None]
        epoch = "" if is_of_the_run(metric) else f", {column_name('checkpoint', checkpoint)}"
        name = metric_name(metric) + epoch
        if entries and not judged:
            reason = "fewer than two seeds with both sides"
            lines.append(f"{name}: no verdict on the differences to {other}: {reason}.")
        if not judged:
            continue
        varying = [c for c in columns_of(entries) if len(levels(entries, c)) > 1 or c in baseline]
        clear = [entry for entry in judged if entry["outside"]]
        line = f"{name}: {len(clear)} of {len(judged)} differences to {other} exclude 0"
        if clear:
            above = sum(entry["mean"] > 0 for entry in clear)
            shown = sorted(clear, key=lambda entry: -abs(entry["mean"]))[:MAX_NAMED]
            line += f", {above} above and {len(clear) - above} below"
            line += ", the largest: " if len(shown) < len(clear) else ": "
            line += "; ".join(_difference(entry, varying) for entry in shown)
        if len(judged) > 1:
            line += f". By chance alone {(1 - LEVEL) * len(judged):.2g} of {len(judged)} would"
        lines.append(line + ".")
    return lines


def _difference(entry: Entry, varying: Sequence[str]) -> str:
    title = ", ".join(column_name(c, entry[c]) for c in varying if entry.get(c) is not None)
    mean, metric = entry["mean"], entry["metric"]
    low, high = (number(entry[key], metric, like=mean, sign=True) for key in ("low", "high"))
    return f"{title} {number(mean, metric, sign=True)} [{low}, {high}], n = {entry['n']}"
