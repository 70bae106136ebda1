"""From tidy rows to means with intervals over seeds, and to differences that are paired by seed."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from metamask_plugin.errors import check, choose

Row = Mapping[str, Any]
Entry = dict[str, Any]

LEVEL = 0.95
FOUND = ("n", "mean", "low", "high", "std", "values", "outside", "left_out")
"""Keys of an entry that are no columns of the rows."""


def summarise(rows: Iterable[Row], factors: Sequence[str]) -> list[Entry]:
    """Mean and 95 % interval over seeds of everything that differs by its seed alone.

    An entry for each combination of the factors, ``checkpoint``, ``metric`` and whatever further columns
    there are, in the order in which they first appear. Several draws of a seed count as their mean: the
    interval is about another training, not about another draw.

    Args:
        rows: tidy rows. A value that is None or not finite is no measurement: it is left out of ``n``.
        factors: of the study, in the order of the columns.

    Returns:
        Mappings with these columns and ``n``, ``mean``, ``std`` (of the sample), ``low`` and ``high``
        (Student's t) and ``values`` by seed. What needs more seeds than there are is None.

    Raises:
        UserError: for two rows that differ in their value alone.
    """
    return [dict(key) | _interval(values) for key, values in _by_seed(rows, factors).items()]


def paired(rows: Iterable[Row], factors: Sequence[str], baseline: Mapping[str, Any]) -> list[Entry]:
    """Differences to a baseline, within the same seed and at the same levels of all other columns.

    What the arms of a seed share, such as the order of the data, is in both sides of a difference and
    cancels. The intervals are not corrected for how many there are.

    Args:
        rows: tidy rows, see :func:`summarise`.
        factors: of the study.
        baseline: the level to compare with, by factor, e.g. ``{"arm": "SimCLR"}``. Factors that it does
            not name vary freely, and are matched.

    Returns:
        For every other level of the baseline's factors what :func:`summarise` returns, of the differences;
        with ``outside``, whether 0 is outside the interval (None without an interval), and ``left_out``, how
        many seeds have one side alone. Where the rows lack the baseline, ``n`` is 0.

    Raises:
        UserError: for a baseline that names no factor, and for two rows that differ in their value alone.
    """
    check(len(baseline) > 0, "baseline", "a level by factor like {arm: SimCLR}", dict(baseline))
    for factor in baseline:
        choose("baseline", factor, factors)
    groups = _by_seed(rows, factors)
    entries = []
    for key, values in groups.items():
        columns = dict(key)
        if all(columns.get(factor) == level for factor, level in baseline.items()):
            continue
        reference = groups.get(tuple((columns | dict(baseline)).items()), {})
        shared = [seed for seed in values if seed in reference]
        found = _interval({seed: values[seed] - reference[seed] for seed in shared})
        outside = None if found["low"] is None else not found["low"] <= 0 <= found["high"]
        left_out = len(values.keys() ^ reference.keys())
        entries.append(columns | found | {"outside": outside, "left_out": left_out})
    return entries


def columns_of(entries: Iterable[Row]) -> list[str]:
    """The columns of rows or entries, in the order in which they first appear."""
    keys = dict.fromkeys(key for entry in entries for key in entry)
    return [key for key in keys if key not in (*FOUND, "seed", "value", "draw")]


def levels(entries: Iterable[Row], column: str) -> list[Any]:
    """The values of a column, in the order in which they first appear; None where an entry lacks it."""
    return list(dict.fromkeys(entry.get(column) for entry in entries))


def _by_seed(rows: Iterable[Row], factors: Sequence[str]) -> dict[Hashable, dict[int, float]]:
    """Values by seed for each combination of the other columns: a tuple of pairs, the factors first."""
    rows = list(rows)
    columns = list(dict.fromkeys([*factors, "checkpoint", "metric", *columns_of(rows)]))
    drawn: dict[Hashable, dict[int, dict[Any, float]]] = {}
    for row in rows:
        key = tuple((column, row[column]) for column in columns if row.get(column) is not None)
        seeds = drawn.setdefault(key, {})
        draws = seeds.setdefault(row["seed"], {})
        title = ", ".join(str(value) for _, value in key)
        check(
            row.get("draw") not in draws,
            "rows",
            "one for each combination and seed",
            f"{title}, seed {row['seed']}, twice",
        )
        draws[row.get("draw")] = row["value"]
    return {
        key: {
            seed: float(np.mean(list(draws.values())))
            for seed, draws in seeds.items()
            if all(value is not None and math.isfinite(value) for value in draws.values())
        }
        for key, seeds in drawn.items()
    }


def _interval(values: Mapping[int, float]) -> Entry:
    sample = np.array(list(values.values()), dtype=float)
    n = len(sample)
    mean = float(sample.mean()) if n else None
    low = high = std = None
    if n > 1:
        std = float(sample.std(ddof=1))
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1)) * std / math.sqrt(n)
        low, high = mean - half, mean + half
    return {"n": n, "mean": mean, "low": low, "high": high, "std": std, "values": dict(values)}
