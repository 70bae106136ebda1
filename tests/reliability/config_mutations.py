"""Random damage to a config, as a user's slip or another tool would do it: for the property test."""

import copy
from typing import Any

from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

EXTREMES = [
    *(float("nan"), float("inf"), float("-inf"), -1, 0, -0.0, 1e-300, 1e300, 10**9, 10**18, 10**30, 2**63),
    *("", " ", "None", "null", "3e-3", "1e-3", "0", "-1", "True", "auto", "..", "../x", "a/b", "/dev/null"),
    *([], {}, [[]], [None], {"a": 1}, [1, "a"], None, True, False, 0.5, 1.0, 2, [1], [0], [0, 0], [-1]),
    *("é" * 9, "名前", "a\nb", "tab\there", "nul\0", "\ud800", "x" * 300, "x" * 10_000, "\u202e", "${nope}"),
    *(
        "???",
        "${oc.env:HOME}",
        "${name}",
        "$(touch shell)",
        "`touch shell`",
        "; touch shell",
        "| touch shell",
    ),
]

values = st.one_of(
    st.sampled_from(EXTREMES),
    st.integers(),
    st.floats(),
    st.text(max_size=20),
    st.booleans(),
    st.none(),
    st.lists(st.one_of(st.integers(), st.text(max_size=5), st.floats()), max_size=3),
    st.dictionaries(st.text(max_size=6), st.one_of(st.integers(), st.none()), max_size=2),
)


def keys_of(node: Any, path: tuple = ()) -> list[tuple]:
    """Every place of a nested config, blocks and leaves."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    found = []
    for key, value in entries:
        found += [(*path, key), *keys_of(value, (*path, key))]
    return found


def put(node: Any, path: tuple, value: Any) -> None:
    """Sets a place; where damage before it took the way there away, nothing happens."""
    for key in path[:-1]:
        if not isinstance(node, dict | list) or (isinstance(node, dict) and key not in node):
            return
        if isinstance(node, list) and not (isinstance(key, int) and key < len(node)):
            return
        node = node[key]
    fits = isinstance(node, list) and isinstance(path[-1], int) and path[-1] < len(node)
    if isinstance(node, dict) or fits:
        node[path[-1]] = value


def take(node: Any, path: tuple) -> None:
    """Removes a place."""
    for key in path[:-1]:
        if isinstance(node, dict) and key in node or isinstance(node, list) and key < len(node):
            node = node[key]
        else:
            return
    if isinstance(node, dict):
        node.pop(path[-1], None)
    elif isinstance(node, list) and path[-1] < len(node):
        node.pop(path[-1])


@st.composite
def damaged(draw, plain: dict, schema: list[str]) -> dict:
    """One to three slips in a copy of a config.

    Args:
        draw: hypothesis's.
        plain: a valid config.
        schema: dotted names of further keys that a config may have.
    """
    node = copy.deepcopy(plain)
    places = keys_of(plain)
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(("value", "value", "schema", "unknown", "missing", "swap")))
        place = draw(st.sampled_from(places))
        if kind == "value":
            put(node, place, draw(values))
        elif kind == "schema":
            key = tuple(draw(st.sampled_from(schema)).split("."))
            for depth in range(1, len(key)):
                block = node
                for part in key[:depth]:
                    block = block.setdefault(part, {}) if isinstance(block, dict) else None
            put(node, key, draw(values))
        elif kind == "unknown":
            name = draw(st.one_of(st.text(min_size=1, max_size=12), st.just(f"{place[-1]}s")))
            put(node, (*place[:-1], name), draw(values))
        elif kind == "missing":
            take(node, place)
        else:
            other = draw(st.sampled_from(places))
            first = node
            for part in other:
                present = isinstance(first, dict) and part in first
                first = first[part] if present else None
            put(node, place, copy.deepcopy(first))
    return node


def config_of(node: dict) -> DictConfig | None:
    """As OmegaConf; None where not even it takes the damage (a YAML file could not hold it either)."""
    try:
        return OmegaConf.create(node)
    except Exception:
        return None
