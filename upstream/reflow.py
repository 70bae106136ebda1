"""Breaks docstring and comment lines that are too long, which black leaves alone."""

import ast
import io
import re
import tokenize

START = re.compile(r"[-*] |\[\d\] ")
"""How a list item or a source starts."""

EXAMPLE = (">>> ", "... ")
"""How a line of an example starts."""

SETTING = re.compile(r"[*`\w.]+(?:, [*`\w.]+)*: ")
"""How a setting starts, in a section of a docstring."""


def reflow(text: str, width: int) -> str:
    """The same words with no prose line over ``width``; code, examples and text in columns stay as they are.

    Words too many for a line go to the next one of their paragraph.
    """
    lines = text.splitlines()
    prose = _prose(text)
    number = 0
    while number < len(lines):
        line = lines[number]
        columns = "  " in line.strip().removeprefix("# ")
        if number in prose and len(line) > width and not columns and not line.lstrip().startswith(EXAMPLE):
            _break(lines, prose, number, width)
        number += 1
    return "\n".join(lines) + "\n"


def _prose(text: str) -> dict[int, tuple[str, int]]:
    """Lines that hold a comment or part of a docstring alone: what they start with, and its own indent."""
    found = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            found[token.start[0] - 1] = ("# ", token.start[1])
    for node in ast.walk(ast.parse(text)):
        value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str) and "\\" not in value.value:
            lines = range(node.lineno - 1, node.end_lineno)
            found.update((number, ("", node.col_offset)) for number in lines)
    return found


def _break(lines: list[str], prose: dict[int, tuple[str, int]], number: int, width: int) -> None:
    line, (prefix, base) = lines[number], prose[number]
    indent = len(line) - len(line.lstrip())
    cut = line.rfind(" ", 0, width + 1)
    if cut <= indent + len(prefix):
        return
    head, words = line[:cut], line[cut + 1 :]
    hanging = _hanging(line[indent:].removeprefix(prefix), indent - base)
    follower = lines[number + 1] if prose.get(number + 1) == (prefix, base) else ""
    after = len(follower) - len(follower.lstrip())
    rest = follower[after:].removeprefix(prefix)
    joins = (
        rest.strip()
        and not rest.startswith(('"""', "    "))
        and not START.match(rest)
        and not _hanging(rest, after - base)
        and "  " not in rest
        and not words.endswith('"""')
        and (after > indent if hanging else after == indent)
    )
    lines[number] = head
    if joins:
        lines[number + 1] = f"{' ' * after}{prefix}{words} {rest}"
        return
    lines.insert(number + 1, f"{' ' * (indent + hanging)}{prefix}{words}")
    for later in sorted((key for key in prose if key > number), reverse=True):
        prose[later + 1] = prose.pop(later)
    prose[number + 1] = (prefix, base)


def _hanging(body: str, depth: int) -> int:
    """By how much what follows is indented further: a list item, or a setting in a section."""
    if body.startswith(("- ", "* ")):
        return 2
    return 4 if depth >= 4 and SETTING.match(body) else 0
