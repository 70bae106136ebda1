"""From tidy rows to means with intervals over seeds, and to differences that are paired by seed."""

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import optimize, stats

from metamask_plugin.errors import check, choose

Row = Mapping[str, Any]
Entry = dict[str, Any]

LEVEL = 0.95
POWER = 0.8
"""Probability with which the paired t-test finds the difference that an entry calls resolvable."""
OF_MEANS = ("n", "mean", "low", "high", "std", "values")
OF_DIFFERENCES = ("outside", "left_out", "p", "p_holm", "clear", "resolvable")
FOUND = (*OF_MEANS, *OF_DIFFERENCES)
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
    cancels. The intervals are not corrected for how many there are; ``p_holm`` and ``clear`` are.

    Args:
        rows: tidy rows, see :func:`summarise`.
        factors: of the study.
        baseline: the level to compare with, by factor, e.g. ``{"arm": "SimCLR"}``. Factors that it does
            not name vary freely, and are matched.

    Returns:
        For every other level of the baseline's factors what :func:`summarise` returns, of the differences.
        Further keys, of which all but ``left_out`` are None without an interval:

        - ``outside``: whether 0 is outside the interval. ``p``: of the paired t-test.
        - ``p_holm``: the same after Holm's correction [0] for all entries of the metric and checkpoint, at
          whatever levels. ``clear``: whether it is below 0.05.
        - ``resolvable``: the true difference that so many seeds would find with probability :data:`POWER`,
          by the paired t-test at level 0.05, not corrected, if the observed deviation is the true one.
        - ``left_out``: how many seeds have one side alone. Where the rows lack the baseline, ``n`` is 0.

    Raises:
        UserError: for a baseline that names no factor, and for two rows that differ in their value alone.

    [0] S. Holm, *A simple sequentially rejective multiple test procedure*, Scandinavian Journal of Statistics
        6, 1979.
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
        left_out = len(values.keys() ^ reference.keys())
        entries.append(columns | found | _tested(found) | {"left_out": left_out})
    for family in _families(entries):
        for entry, p in zip(family, _holm([entry["p"] for entry in family]), strict=True):
            entry |= {"p_holm": p, "clear": p < 1 - LEVEL}
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


def _tested(found: Entry) -> Entry:
    """The keys of a difference that its own seeds decide; the corrected ones are None yet."""
    if found["low"] is None:
        return dict.fromkeys(OF_DIFFERENCES)
    error = found["std"] / math.sqrt(found["n"])
    freedom = found["n"] - 1
    # seeds that all agree: nothing is due to chance
    p = float(2 * stats.t.sf(abs(found["mean"]) / error, freedom)) if error else float(found["mean"] == 0)
    return dict.fromkeys(OF_DIFFERENCES) | {
        "outside": not found["low"] <= 0 <= found["high"],
        "p": p,
        "resolvable": _resolvable_errors(freedom) * error,
    }


@lru_cache
def _resolvable_errors(freedom: int) -> float:
    """The difference that the two-sided t-test finds with probability POWER, in standard errors."""
    least = stats.t.ppf((1 + LEVEL) / 2, freedom)
    roughly = least + stats.t.ppf(POWER, freedom)
    # the tail on the wrong side is too rare to count
    return float(optimize.brentq(lambda shift: stats.nct.sf(least, freedom, shift) - POWER, 0, 2 * roughly))


def _families(entries: Iterable[Entry]) -> list[list[Entry]]:
    """The tested entries of each metric and checkpoint."""
    families: dict[Any, list[Entry]] = {}
    for entry in entries:
        if entry["p"] is not None:
            families.setdefault((entry["metric"], entry.get("checkpoint")), []).append(entry)
    return list(families.values())


def _holm(p: Sequence[float]) -> list[float]:
    """Adjusted p-values: the smallest times their number, the next times one less, and so on."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable")):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


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
