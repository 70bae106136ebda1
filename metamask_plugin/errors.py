"""The one exception that is meant for the user, and the phrases it is built from."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

LONGEST = 160
"""Characters of a found value that a message shows: a line must stay one that can be read."""


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
        raise UserError(f"{name} must be {expected}, got {shown(found)}" + (f"; {remedy}" if remedy else ""))


def choose(name: str, value: Any, options: Iterable[str]) -> str:
    """Returns ``value`` if it is one of ``options``, else raises with the list and the nearest match.

    Args:
        name: the setting as the user writes it.
        value: what was asked for.
        options: the names that exist.
    """
    options = sorted(options)
    if isinstance(value, str) and value in options:
        return value
    hint = nearest(value, options)
    check(False, name, f"one of {', '.join(options)}", value, f"did you mean {hint!r}?" if hint else "")
    raise AssertionError("unreachable")


def nearest(value: Any, options: Iterable[str]) -> str | None:
    """The option that is most like ``value``: but for its case, begun by it, or of like letters; or None."""
    options, text = list(options), str(value)[:LONGEST]
    alike = [option for option in options if option.lower() == text.lower()]
    begun = [option for option in options if len(text) > 2 and option.lower().startswith(text.lower())]
    near = alike or sorted(begun, key=len) or get_close_matches(text, options, n=1)
    return near[0] if near else None


def shown(value: Any) -> str:
    """A value as a message shows it: in one line, and not longer than one can read."""
    try:
        text = repr(value)
    except Exception as error:  # a config's node that cannot be resolved has no text either
        text = f"<{type(value).__name__}: {type(error).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 20]}... ({len(text)} characters)"


def printable(text: str) -> str:
    """The text with all spelt out that a terminal would act on: escape sequences, line ends, directions."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class NonFiniteError(UserError):
    """A loss, gradient or meta parameter that is NaN or infinite.

    Attributes:
        seen: what was seen of it, in plain values, for a file beside the run.
    """

    def __init__(self, message: str, seen: dict[str, Any]):
        super().__init__(message)
        self.seen = seen
