"""Refuses YAML files whose aliases unfold to more values than a config has (a "billion laughs")."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from omegaconf import OmegaConf

from metamask_plugin.errors import check

MOST_VALUES = 10_000
"""Values of one file, with every alias unfolded. OmegaConf copies each, some milliseconds apiece."""


@contextmanager
def bounded_aliases() -> Iterator[None]:
    """Within it, ``OmegaConf.load``, which Hydra reads every file with, counts the values first."""
    load = OmegaConf.load

    def counted(file: Any) -> Any:
        if hasattr(file, "seek"):
            text = file.read()
            file.seek(0)
            if "*" in text and "&" in text:
                name = getattr(file, "name", "a config file")
                remedy = "write the values out, or take aliases away"
                values = unfolded(text)
                check(values <= MOST_VALUES, str(name), f"of at most {MOST_VALUES} values", values, remedy)
        return load(file)

    OmegaConf.load = staticmethod(counted)
    try:
        yield
    finally:
        OmegaConf.load = staticmethod(load)


def unfolded(text: str) -> float:
    """How many values a YAML text has with its aliases unfolded; infinity for an alias within itself."""
    known: dict[int, float] = {}

    def count(node: yaml.Node | None) -> float:
        if node is None or isinstance(node, yaml.ScalarNode):
            return 1
        if id(node) not in known:
            known[id(node)] = float("inf")  # while it is counted
            entries = node.value
            if isinstance(node, yaml.MappingNode):
                entries = [entry for pair in node.value for entry in pair]
            known[id(node)] = sum(map(count, entries))
        return known[id(node)]

    return count(yaml.compose(text, Loader=yaml.SafeLoader))
