"""Keys of a pretraining config that had another name before.

The old names are accepted for one version, with a warning (:func:`with_new_names`). The table stays when they
go: what runs and trials of earlier versions recorded is found by their names (:func:`with_earlier_names`).
"""

import sys
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any, NamedTuple

from metamask_plugin.errors import check


class Renamed(NamedTuple):
    """A key that has a new name.

    Attributes:
        old: its dotted name before.
        new: its dotted name.
        shipped: values that it has in shipped configs: an old name that is laid over one of these counts.
        values: new names of its values, by the old ones.
    """

    old: str
    new: str
    shipped: tuple[Any, ...] = ()
    values: Mapping[str, str] = {}


RENAMED = (
    Renamed("numbers.nonfinite", "numerics.on_nonfinite", ("stop",)),
    Renamed("numbers.max_skipped", "numerics.max_skipped_steps", (10,)),
    Renamed("numbers.collapse_below", "numerics.collapse_below", (0.01,)),
    Renamed(
        "method_kwargs.meta.schedule",
        "method_kwargs.meta.when",
        ("after_step", "epoch_end"),
        {"iteration": "after_step", "shared": "before_step", "epoch": "epoch_end"},
    ),
    Renamed("method_kwargs.meta.follow_schedule", "method_kwargs.meta.decay_lr"),
)
OLD_NAMES = tuple(entry.old for entry in RENAMED)

VALUES = {"method": {"bare": "baseline"}}
"""New names of values whose key is called as before, by the old ones."""


def with_new_names(
    node: MutableMapping[str, Any], typed: Collection[str] = (), quiet: bool = False
) -> MutableMapping[str, Any]:
    """Puts the new names and values in the place of the old ones.

    Args:
        node: the config; it is changed.
        typed: keys that the user has written beside what shipped configs say, as on the command line.
        quiet: whether there is no warning.

    Returns:
        The config.

    Raises:
        UserError: for a key that has both names, and two values.
    """
    for old, new, shipped, values in RENAMED:
        if not _has(node, old):
            continue
        given = take(node, old)
        value = values.get(given, given) if isinstance(given, str) else given
        there = take(node, new)
        written = there is not None and (new in typed or there not in shipped)
        check(
            not written or there == value,
            old,
            f"left out beside {new}, its new name",
            given,
            f"write {new} alone",
        )
        put(node, new, value)
        if not quiet:
            print(
                f"warning: {old} is called {new} now; the old name goes with the next version",
                file=sys.stderr,
            )
    for key, values in VALUES.items():
        value = node.get(key)
        if isinstance(value, str) and value in values:
            node[key] = values[value]
            if not quiet:
                print(
                    f"warning: {key}={value} is called {key}={values[value]} now; "
                    "the old name goes with the next version",
                    file=sys.stderr,
                )
    return node


def earlier_value(key: str, value: str) -> str:
    """What a value was called before, in records of earlier versions; the value itself without a new name."""
    return {new: old for old, new in VALUES.get(key, {}).items()}.get(value, value)


def with_earlier_names(node: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Puts the old names and values in the place of the new ones, for what is compared with earlier records.

    Args:
        node: the config; it is changed.

    Returns:
        The config.
    """
    for old, new, _, values in RENAMED:
        if _has(node, new):
            value = take(node, new)
            if not _has(node, old):
                put(node, old, {later: earlier for earlier, later in values.items()}.get(value, value))
    for key in VALUES:
        if isinstance(node.get(key), str):
            node[key] = earlier_value(key, node[key])
    return node


def in_new_names(key: str, value: Any) -> tuple[str, Any]:
    """What is called so now, for a message about what is recorded in earlier names.

    Args:
        key: dotted.
        value: of the key.
    """
    for old, new, _, values in RENAMED:
        if key == old:
            return new, values.get(value, value)
    return key, VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def _block(node: Any, key: str) -> Any:
    """The block that a dotted key stands in; None where there is none."""
    for part in key.split(".")[:-1]:
        node = node.get(part) if isinstance(node, MutableMapping) else None
    return node if isinstance(node, MutableMapping) else None


def _has(node: MutableMapping[str, Any], key: str) -> bool:
    block = _block(node, key)
    return block is not None and key.rpartition(".")[2] in block


def take(node: MutableMapping[str, Any], key: str) -> Any:
    """Takes a dotted key out, with a top-level block that it leaves empty; None if it is missing."""
    if not _has(node, key):
        return None
    value, first = _block(node, key).pop(key.rpartition(".")[2]), key.partition(".")[0]
    if first in node and not node[first]:
        del node[first]
    return value


def put(node: MutableMapping[str, Any], key: str, value: Any) -> None:
    """Sets a dotted key; makes the blocks on the way."""
    *path, last = key.split(".")
    for part in path:
        if not isinstance(node.get(part), MutableMapping):
            node[part] = {}
        node = node[part]
    node[last] = value
