"""One file's way from here to solo-learn: imports, wording, Python 3.8, line width."""

import re
from pathlib import Path

import pytest

UPSTREAM = Path(__file__).resolve().parents[2] / "upstream"


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(UPSTREAM))


@pytest.fixture
def rewriting():
    from rewrite import Rewriting

    modules = {
        "metamask_plugin.losses": "solo.bilevel.losses",
        "metamask_plugin.methods": "solo.methods",
        "metamask_plugin.methods.presets": "solo.bilevel.presets",
        "method_config": "tests.methods.method_config",
    }
    names = {("metamask_plugin.host", "BaseMethod"): "solo.methods.base"}
    return Rewriting(modules, names, [(r"the host\b", "the base class")])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("from metamask_plugin.losses.cmc import a, b", "from solo.bilevel.losses.cmc import a, b"),
        ("from metamask_plugin.host import BaseMethod", "from solo.methods.base import BaseMethod"),
        (
            "from metamask_plugin.methods import (\n    bare,\n    presets,\n)",
            "from solo.bilevel import presets\nfrom solo.methods import bare",
        ),
        (
            "from metamask_plugin.losses import a  # noqa: F401",
            "from solo.bilevel.losses import a  # noqa: F401",
        ),
        ("from method_config import a as b", "from tests.methods.method_config import a as b"),
        ("from math import pi", "from math import pi"),
    ],
)
def test_imports(rewriting, ours, theirs):
    assert rewriting("some.py", f"{ours}\n") == f"{theirs}\n"
    indented = "".join(f"    {line}\n" for line in theirs.splitlines())
    inside = re.sub(r"^(?=\S)", "    ", ours, flags=re.M).replace("    )", ")")
    assert rewriting("some.py", f"def f():\n{inside}\n") == f"def f():\n{indented}"


def test_imports_in_strings_and_names_in_prose(rewriting):
    text = (
        'SCRIPT = """\nfrom metamask_plugin.losses import a\n"""\n'
        "# :func:`~metamask_plugin.losses.a` and the host\n"
    )
    assert rewriting("some.py", text) == (
        'SCRIPT = """\nfrom solo.bilevel.losses import a\n"""\n'
        "# :func:`~solo.bilevel.losses.a` and the base class\n"
    )


def test_what_has_no_place_in_solo_learn_is_named(rewriting):
    from refusal import Refusal

    with pytest.raises(Refusal, match="tests/some.py names metamask_plugin.data.splits, which has no place"):
        rewriting("tests/some.py", "from metamask_plugin.data.splits import Split\n")


def test_a_definition_goes_with_the_imports_that_it_alone_needs(rewriting):
    text = (
        "import re\nfrom metamask_plugin.data import a\n\n\n"
        "@a\ndef gone():\n    return a()\n\n\ndef stays():\n    return re\n"
    )
    assert re.sub(r"\n+", "\n", rewriting("tests/some.py", text, without=["gone"])) == (
        "import re\ndef stays():\n    return re\n"
    )


def test_a_rule_that_does_not_fit_any_more_is_named(rewriting):
    from refusal import Refusal

    with pytest.raises(Refusal, match="some.py: nothing fits 'gone' any more"):
        rewriting("some.py", "a = 1\n", substitutions=[("gone", "")])
    with pytest.raises(Refusal, match="some.py has no gone any more"):
        rewriting("some.py", "a = 1\n", without=["gone"])


def test_python_38():
    from rewrite import for_python_38

    text = (
        '"""Doc."""\n\nfrom collections.abc import Callable\nfrom dataclasses import dataclass\n'
        "from typing import Any\n\nAlias = dict[str, Callable[[int], tuple[int]]]\n\n\n"
        "def f(x: int | None) -> list[int]:\n    return x.removeprefix(PREFIX)\n"
    )
    assert for_python_38(text) == (
        '"""Doc."""\n\nfrom __future__ import annotations\n\nfrom dataclasses import dataclass\n'
        "from typing import Any, Callable, Dict, Tuple\n\n"
        "Alias = Dict[str, Callable[[int], Tuple[int]]]\n\n\n"
        'def f(x: int | None) -> list[int]:\n    return x.replace(PREFIX, "", 1)\n'
    )


LONG = '''class A:
    """What it is.

    The first line of a paragraph that is
    wide, and another one.

    Args:
        first: a setting with a long line of
            text behind.
        second, third: two settings on a line.

    Example:
        >>> A("code of an example", "too")
        True

    [0] A source that is too long.
    [1] Another.
    """

    # a comment that goes on for a bit more
    # than fits
    x = "code that is wider stays as it is, on its line"
'''


def test_prose_is_broken_and_keeps_its_words_and_its_structure():
    from reflow import reflow

    short = reflow(LONG, 36)
    assert short.split('"""')[1].split() == LONG.split('"""')[1].split()
    assert [len(line) for line in short.splitlines() if len(line) > 36] == [42, 56]
    for line in (
        "    The first line of a paragraph",
        "    that is wide, and another one.",
        "        first: a setting with a long",
        "            line of text behind.",
        "        second, third: two settings",
        "            on a line.",
        "    [1] Another.",
        "    # a comment that goes on for a",
        "    # bit more than fits",
    ):
        assert line in short.splitlines(), short
    assert reflow(short, 36) == short and reflow(LONG, 110) == LONG
