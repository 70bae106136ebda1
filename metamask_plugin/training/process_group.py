"""How long the processes of a run wait for one another."""

import inspect
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import Strategy, StrategyRegistry

from metamask_plugin.errors import check

NAME = "process_timeout"


def with_timeout(strategy: str, seconds: Any) -> Strategy | str:
    """Lightning's strategy of that name, whose collectives give up after ``seconds``.

    A rank that hangs (a stopped process, a dead disk) keeps the others waiting in a collective; after this
    time they say so. Starting a process counts, too: all wait for the last one's imports.

    Args:
        strategy: its name; ``auto`` is ``ddp``, which it means for several processes.
        seconds: the timeout; None for Lightning's, half an hour.

    Raises:
        UserError: not a positive number, or a strategy without process groups.
    """
    if seconds is None:
        return strategy
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
    check(number, NAME, "a number of seconds > 0, or null for Lightning's default", seconds)
    name = "ddp" if strategy == "auto" else strategy
    known = name in StrategyRegistry and _has_timeout(StrategyRegistry[name]["strategy"])
    check(known, NAME, f"null with strategy={strategy!r}, which has no such setting", seconds)
    entry = StrategyRegistry[name]  # not its get, which makes the strategy
    return entry["strategy"](timeout=timedelta(seconds=seconds), **entry["init_params"])


def _has_timeout(strategy: type[Strategy]) -> bool:
    return "timeout" in inspect.signature(strategy.__init__).parameters
