"""The papers' own numbers: grids in ``scripts/study/reference``, as the tables print them."""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.errors import check, choose

FORM = "a grid like {columns: {metric: [knn5]}, arm: {SimCLR: [81.7]}}, or a list of them"


def reference(given: Any, name: str) -> list[dict[str, Any]]:
    """A row for each of the paper's numbers.

    Args:
        given: the study's ``paper``: grids, or the name of a study whose numbers these are; null for its own.
        name: of the study.

    Returns:
        Rows with the levels that a number is of, its ``metric`` and its ``value``.

    Raises:
        UserError: for a study without numbers, or a grid whose rows have not as many as it has columns.
    """
    if isinstance(given, str):
        choose("paper", given, _shipped())
    grids = _shipped().get(given or name, []) if given is None or isinstance(given, str) else given
    return [row for grid in (grids if isinstance(grids, list) else [grids]) for row in _rows(grid)]


@functools.cache
def _shipped() -> dict[str, Any]:
    files = sorted((SCRIPTS / "study" / "reference").glob("*.yaml"))
    shipped: dict[str, Any] = {}
    for file in files:
        for name, grids in OmegaConf.to_container(OmegaConf.load(file)).items():
            shipped[name] = [*shipped.get(name, []), *(grids if isinstance(grids, list) else [grids])]
    return shipped


def _rows(grid: Any) -> list[dict[str, Any]]:
    check(isinstance(grid, Mapping) and len(grid) == 2 and "columns" in grid, "paper", FORM, grid)
    columns = grid["columns"]
    (factor,) = (key for key in grid if key != "columns")
    places = [dict(zip(columns, levels)) for levels in itertools.product(*columns.values())]
    rows = []
    for level, numbers in grid[factor].items():
        expected = f"{len(places)} numbers, one for each combination of the columns"
        check(len(numbers) == len(places), f"paper, {factor} {level}", expected, numbers)
        rows += [
            {factor: level, **place, "value": number}
            for place, number in zip(places, numbers)
            if number is not None
        ]
    return rows
