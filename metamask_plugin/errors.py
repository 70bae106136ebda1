"""The one exception that is meant for the user, and the phrases it is built from."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class UserError(ValueError):
    """Input that the user can mend. The command line prints it as one line and exits with 2.

    The message names the setting, what was expected, what was found, and the remedy.
    """


def check(condition: bool, name: str, expected: str, found: Any, remedy: str = "") -> None:
    """Raises :class:`UserError` unless ``condition`` holds.

    Args:
        condition: what must be true.
        name: the setting as the user writes it, e.g. ``"method_kwargs.alpha"``.
        expected: completes "<name> must be ...".
        found: the offending value.
        remedy: what to do about it; optional where ``expected`` says it all.
    """
    if not condition:
        raise UserError(f"{name} must be {expected}, got {found!r}" + (f"; {remedy}" if remedy else ""))


def choose(name: str, value: Any, options: Iterable[str]) -> str:
    """Returns ``value`` if it is one of ``options``, else raises with the list and the nearest match.

    Args:
        name: the setting as the user writes it.
        value: what was asked for.
        options: the names that exist.
    """
    options = sorted(options)
    if value in options:
        return value
    near = get_close_matches(str(value), options, n=1)
    hint = f"did you mean {near[0]!r}?" if near else ""
    check(False, name, f"one of {', '.join(options)}", value, hint)
    raise AssertionError("unreachable")
