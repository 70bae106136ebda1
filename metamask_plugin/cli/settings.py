"""What the value of a config key may be: the vocabulary of the tables in ``schema*.py``."""

import importlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metamask_plugin.errors import check, choose

MOST_WHOLE = 10**9
MOST_NUMBER = 1e9
"""Beyond these a number is a slip; and nothing behind a config has to think of an overflow."""
MOST_CHARACTERS = 4096
MOST_IN_A_NAME = 200
"""Bytes: a file system allows 255, and a run's folder appends a digest."""


@dataclass(frozen=True)
class Setting:
    """One key: what it means, and which values it takes.

    Attributes:
        meaning: one line for the reader of a table.
        kind: ``whole`` (a bool is none), ``number``, ``flag``, ``word`` (one of ``choices``), ``text``,
            ``path``, ``folder name``, ``list``, ``block`` (keys of its own, checked elsewhere), ``any``.
        least: smallest value.
        above: the value must be larger than this.
        most: largest value.
        below: the value must be smaller than this.
        choices: of a ``word``; a function where they are to be looked up only when they are needed.
        also: values that are accepted besides; a function, as ``choices``.
        null: whether null is accepted.
        of: what the entries of a ``list`` are.
        matches: a regular expression for all of a ``text``; ``expected`` says it in words.
        expected: completes "must be ...", in place of what the rest of the setting says.
        unused: whether the key is solo-learn's alone: accepted, and without effect here.
    """

    meaning: str
    kind: str = "any"
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: Sequence[str] | Callable[[], Iterable[str]] = ()
    also: Sequence | Callable[[], Iterable] = ()
    null: bool = False
    of: "Setting | None" = None
    matches: str = ""
    expected: str = ""
    unused: bool = False

    @property
    def options(self) -> list[str]:
        """The words that it may be."""
        return list(self.choices() if callable(self.choices) else self.choices)

    @property
    def others(self) -> list:
        """The values that are accepted besides."""
        return list(self.also() if callable(self.also) else self.also)

    def range(self, value: float | None = None) -> str:
        """The range in symbols; limits that nobody meets are named where ``value`` exceeds them."""
        limits = [(">=", self.least), (">", self.above), ("<", self.below)]
        if self.most is not None and (self.most <= 1 or (value is not None and value > self.most)):
            limits.append(("<=", self.most))
        return " and ".join(f"{sign} {limit:g}" if isinstance(limit, float) else f"{sign} {limit}"
                            for sign, limit in limits if limit is not None)  # fmt: skip


def registry(where: str, *others: str) -> Callable[[], list[str]]:
    """The names in a registry, for ``choices``: looked up when needed, since most registries bring torch.

    Args:
        where: ``module:NAME``, the module within this package.
        others: words that are accepted besides.
    """
    module, _, name = where.partition(":")
    return lambda: [*getattr(importlib.import_module(f"metamask_plugin.{module}"), name), *others]


def whole(meaning: str, least: int | None = 0, most: int = MOST_WHOLE, **rest: Any) -> Setting:
    """An integer; a bool is none, and neither is 2.0."""
    return Setting(meaning, "whole", least=least, most=most, **rest)


def number(meaning: str, least: float | None = None, most: float = MOST_NUMBER, **rest: Any) -> Setting:
    """A finite number."""
    return Setting(meaning, "number", least=least, most=most, **rest)


def flag(meaning: str, **rest: Any) -> Setting:
    """True or False."""
    return Setting(meaning, "flag", **rest)


def word(meaning: str, choices: Sequence[str] | Callable[[], Iterable[str]], **rest: Any) -> Setting:
    """One of some words."""
    return Setting(meaning, "word", choices=choices, **rest)


def text(meaning: str, **rest: Any) -> Setting:
    """Any text of one line."""
    return Setting(meaning, "text", **rest)


def path(meaning: str, **rest: Any) -> Setting:
    """The path of a file or folder, whether there is one or not."""
    return Setting(meaning, "path", **rest)


def block(meaning: str, **rest: Any) -> Setting:
    """Keys that belong to the object they are passed to."""
    return Setting(meaning, "block", **rest)


def sequence(meaning: str, of: Setting, **rest: Any) -> Setting:
    """A list."""
    return Setting(meaning, "list", of=of, **rest)


def check_value(name: str, value: Any, setting: Setting) -> None:
    """Raises a UserError unless the value fits.

    Args:
        name: the key as the user writes it.
        value: plain, as of ``OmegaConf.to_container``.
        setting: what it must be.
    """
    if value is None and setting.null:
        return
    if any(value == other and type(value) is type(other) for other in setting.others):
        return
    _CHECKS[setting.kind](name, value, setting)


def check_finite(name: str, value: Any) -> None:
    """Refuses what no setting can be, however deep: NaN, infinity, text with control characters."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            check(isinstance(key, str), f"a key of {name}", "text", key)
            check_finite(f"{name}.{key}", entry)
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            check_finite(f"{name}[{index}]", entry)
    elif isinstance(value, str):
        _text(name, value, text(""))
    elif isinstance(value, int | float):
        finite = isinstance(value, int) or math.isfinite(value)
        check(finite, name, "a finite number", value)
        if isinstance(value, int):
            check(abs(value) < 2**63, name, "a number that 64 bits hold", value)
    else:
        check(value is None, name, "text, a number, True, False, null, a list or a block", value)


def _whole(name: str, value: Any, setting: Setting) -> None:
    expected = setting.expected or f"an integer {setting.range()}"
    valid = isinstance(value, int) and not isinstance(value, bool)
    check(valid, name, _with_others(expected, setting), value, _number_remedy(value, whole=True))
    if not _within(value, setting):
        expected = setting.expected or f"an integer {setting.range(value)}"
        check(False, name, _with_others(expected, setting), value)


def _number(name: str, value: Any, setting: Setting) -> None:
    limits = setting.range()
    expected = setting.expected or f"a number {limits}".rstrip()
    valid = isinstance(value, int | float) and not isinstance(value, bool)
    check(valid, name, _with_others(expected, setting), value, _number_remedy(value))
    check(not isinstance(value, float) or math.isfinite(value), name, "a finite number", value)
    if not _within(value, setting):
        check(False, name, _with_others(setting.expected or setting.range(value), setting), value)


def _within(value: float, setting: Setting) -> bool:
    most = MOST_NUMBER if setting.most is None else setting.most
    least = -MOST_NUMBER if setting.least is None else setting.least
    return (
        least <= value <= most
        and (setting.above is None or value > setting.above)
        and (setting.below is None or value < setting.below)
    )


def _number_remedy(value: Any, whole: bool = False) -> str:
    """A text that looks like a number was put between quotes, or is one that YAML 1.1 reads as text."""
    if isinstance(value, bool):
        return "a switch is no number"
    if isinstance(value, float) and whole and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return ""
        if math.isfinite(number):
            return f"this is text, not a number: write {number!r} without quotes"
    return ""


def _flag(name: str, value: Any, setting: Setting) -> None:
    remedy = "write it without quotes" if str(value).lower() in ("true", "false") else ""
    check(isinstance(value, bool), name, _with_others("True or False", setting), value, remedy)


def _word(name: str, value: Any, setting: Setting) -> None:
    choose(name, value, setting.options)


def _text(name: str, value: Any, setting: Setting) -> None:
    check(isinstance(value, str), name, _with_others(setting.expected or "text", setting), value)
    check(
        not setting.matches or re.fullmatch(setting.matches, value) is not None, name, setting.expected, value
    )
    check(len(value) <= MOST_CHARACTERS, name, f"at most {MOST_CHARACTERS} characters long", value)
    check(value.isprintable() or all(c.isprintable() or c in "\t\n" for c in value), name,
          "text without control characters", value)  # fmt: skip


def _path(name: str, value: Any, setting: Setting) -> None:
    _text(name, value, setting)
    check(value.strip() != "", name, _with_others("a path", setting), value)
    check("\n" not in value, name, "a path in one line", value)
    longest = max((len(part.encode()) for part in value.split("/")), default=0)
    check(longest <= 255, name, "a path whose parts have at most 255 bytes", value)


def _mask(name: str, value: Any, setting: Setting) -> None:
    if isinstance(value, str):
        _path(name, value, setting)
        return
    check(isinstance(value, list), name, "a run, a checkpoint, or a list of weights", value)
    for index, weight in enumerate(value):
        check(isinstance(weight, int | float), f"{name}[{index}]", "a number", weight)


def _folder_name(name: str, value: Any, setting: Setting) -> None:
    _text(name, value, setting)
    usable = value.strip() not in ("", ".", "..") and value.isprintable()
    check(usable, name, "a folder's name", value)
    inside = not any(sign in value for sign in "/\\")
    check(inside, name, "a folder's name without / and \\", value, "set checkpoint.dir for another place")
    check(len(value.encode()) <= MOST_IN_A_NAME, name, f"at most {MOST_IN_A_NAME} bytes long", value)


def _list(name: str, value: Any, setting: Setting) -> None:
    check(isinstance(value, list), name, _with_others(setting.expected or "a list", setting), value)
    check(len(value) > 0 or not setting.expected, name, setting.expected, value)
    for index, entry in enumerate(value):
        check_value(f"{name}[{index}]", entry, setting.of)


def _block(name: str, value: Any, setting: Setting) -> None:
    check(isinstance(value, Mapping), name, setting.expected or "a block of keys", value)


def _with_others(expected: str, setting: Setting) -> str:
    if setting.expected:
        return expected
    return " or ".join([expected, *(f"{other}" for other in setting.others)])


_CHECKS: dict[str, Callable[[str, Any, Setting], None]] = {
    "whole": _whole,
    "number": _number,
    "flag": _flag,
    "word": _word,
    "text": _text,
    "path": _path,
    "mask": _mask,
    "folder name": _folder_name,
    "list": _list,
    "block": _block,
    "any": lambda name, value, setting: None,
}
