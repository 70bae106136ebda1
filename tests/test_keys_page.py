"""docs/keys.md is as the tool writes it, and names every key."""

import importlib.util
from pathlib import Path

from metamask_plugin.cli.known import keys
from metamask_plugin.cli.schema import BLOCKS, RUN
from metamask_plugin.cli.schema_linear import LINEAR
from metamask_plugin.cli.schema_study import STUDY

TOOL = Path(__file__).resolve().parents[1] / "tools" / "keys_page.py"
spec = importlib.util.spec_from_file_location("keys_page", TOOL)
keys_page = importlib.util.module_from_spec(spec)
spec.loader.exec_module(keys_page)


def test_the_page_is_as_it_would_be_written():
    assert keys_page.PAGE.read_text() == keys_page.page(), "run make keys"


def test_every_key_is_on_it():
    text = keys_page.PAGE.read_text()
    ours = {**RUN, **BLOCKS, **LINEAR, **STUDY}
    ours = [key for key, setting in ours.items() if not setting.unused]
    assert len(ours) > 100 and not [key for key in ours if f"| `{key}` |" not in text]
    within = [key for key in keys("pretrain") if key.startswith("method_kwargs.")]
    named = [key.removeprefix("method_kwargs.").removeprefix("task_kwargs.") for key in within]
    assert len(named) > 70 and not [key for key in named if f"| `{key}` |" not in text]
