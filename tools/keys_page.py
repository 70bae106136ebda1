"""Writes docs/keys.md: every key of every config, from the tables that a config is checked against.

python tools/keys_page.py
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metamask_plugin.cli import config, linear
from metamask_plugin.cli.schema import BLOCKS, RUN, as_markdown
from metamask_plugin.cli.schema_linear import LINEAR
from metamask_plugin.cli.schema_methods import BARE, DATA_KWARGS, ICL_MSR, METAMASK, TASK_KWARGS
from metamask_plugin.cli.schema_study import MEASURE_OPTIONS, STUDY
from metamask_plugin.methods import icl_msr, metamask

PAGE = Path(__file__).resolve().parents[1] / "docs" / "keys.md"
HEAD = """# Every key

What a config may hold, which values each key takes, and what it means where the config is silent. Made by
`make keys` from the tables that configs are checked against. Explanations with examples are in
[configuration](configuration.md). Keys of solo-learn or Lightning alone are accepted and not listed;
`null` stands for the default.
"""
TASK_NOTE = "Which of these a task has, and their defaults, its constructor says."


def page() -> str:
    """The page as it is to be."""
    return "\n".join([HEAD, *(f"## {title}\n\n{body}\n" for title, body in _sections())])


def _sections() -> Iterator[tuple[str, str]]:
    yield "Pretraining", as_markdown({**RUN, **BLOCKS}, config.DEFAULTS)
    own = {key: BARE[key] for key in BARE if key not in METAMASK and key not in ICL_MSR}
    for title, table, module in (("MetaMask", METAMASK, metamask), ("ICL-MSR", ICL_MSR, icl_msr)):
        defaults = {**_flat(module.PRESETS["paper"]), "preset": "paper"}
        yield f"`method_kwargs` of {title}", as_markdown(table, defaults)
    yield "`method_kwargs` of a task alone (`method=bare`)", as_markdown(own)
    yield "`method_kwargs.task_kwargs`", f"{as_markdown(TASK_KWARGS)}\n\n{TASK_NOTE}"
    yield "`data.kwargs`", as_markdown(DATA_KWARGS)
    yield "Linear evaluation and fine-tuning", as_markdown(LINEAR, linear.DEFAULTS)
    yield "Studies", as_markdown(STUDY)
    for name, options in MEASURE_OPTIONS.items():
        if options:
            yield f"Studies: `measures.{name}`", as_markdown(options)


def _flat(node: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{within}{key}.") if inner else {f"{within}{key}": value}
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
