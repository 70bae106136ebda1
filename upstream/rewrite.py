"""Rewrites one Python file of ours for solo-learn: imports, wording, and Python 3.8, which it supports."""

import ast
import re
from collections.abc import Iterable

from refusal import Refusal

IMPORT = re.compile(r"^([ \t]*)from ([\w.]+) import (\([^)]*\)|[^\n#(]+?)([ \t]*#[^\n]*)?$", re.M)
PATH = re.compile(r"\bmetamask_plugin(?:\.\w+)+")
BUILTINS = {"dict": "Dict", "list": "List", "set": "Set", "tuple": "Tuple", "type": "Type"}


class Rewriting:
    """The rules that hold for every file.

    Args:
        modules: our module names to solo-learn's; the longest that fits counts.
        names: (our module, a name in it) to the module that has it there.
        wording: regular expressions and what they are replaced by.
    """

    def __init__(
        self,
        modules: dict[str, str],
        names: dict[tuple[str, str], str],
        wording: list[tuple[str, str]],
    ):
        self.modules, self.names, self.wording = modules, names, wording

    def __call__(
        self,
        path: str,
        text: str,
        without: Iterable[str] = (),
        substitutions: Iterable[tuple[str, str]] = (),
        deeper: int = 0,
    ) -> str:
        """The file as it is to be in solo-learn, but for formatting.

        Args:
            path: where it is here, for messages.
            text: what it says.
            without: names of definitions to leave out.
            substitutions: regular expressions for this file alone.
            deeper: by how many folders it lies deeper there.

        Raises:
            Refusal: for a rule that does not fit any more, or an import without a place in solo-learn.
        """
        for pattern, replacement in substitutions:
            text, count = re.subn(pattern, replacement, text, flags=re.M)
            if not count:
                raise Refusal(f"{path}: nothing fits {pattern!r} any more; correct upstream/generate.py")
        if without:
            for name in without:
                text = text.replace(definition(text, name, path), "")
            text = without_unused_imports(text)
        for pattern, replacement in self.wording:
            text = re.sub(pattern, replacement, text)
        text = IMPORT.sub(lambda match: self._import(match, path), text)
        text = PATH.sub(lambda match: self._module(match[0], path), text)
        if path.startswith("tests/"):
            text = _test_paths(text, deeper)
        return imports_in_order(for_python_38(text))

    def _import(self, match: re.Match, path: str) -> str:
        indent, module, names, comment = match.groups()
        if module.split(".")[0] != "metamask_plugin" and module not in self.modules:
            return match[0]
        places: dict[str, list[str]] = {}
        for name in filter(None, (part.strip() for part in names.strip("()").split(","))):
            place, new = self._place(module, name, path)
            places.setdefault(place, []).append(new)
        lines = [f"{indent}from {place} import {', '.join(new)}" for place, new in sorted(places.items())]
        return "\n".join(lines) + (comment or "")

    def _place(self, module: str, name: str, path: str) -> tuple[str, str]:
        if (module, name) in self.names:
            return self.names[module, name], name
        submodule = self.modules.get(f"{module}.{name}")
        if submodule is None:
            return self._module(module, path), name
        place, _, new = submodule.rpartition(".")
        return place, name if new == name else f"{new} as {name}"

    def _module(self, name: str, path: str) -> str:
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            place = self.modules.get(".".join(parts[:length]))
            if place is not None:
                return ".".join([place, *parts[length:]])
        raise Refusal(f"{path} names {name}, which has no place in solo-learn; see upstream/generate.py")


def _test_paths(text: str, deeper: int) -> str:
    """Paths from the test's own file, and cases that take longer than solo-learn's tests do."""
    text = re.sub(
        r"(Path\(__file__\)\.resolve\(\)\.parents)\[(\d+)\](?= / \"scripts)",
        lambda match: f"{match[1]}[{int(match[2]) + deeper}]",
        text,
    )
    text = re.sub(r'scripts/pretrain(?=/task/|")', "scripts/pretrain/bilevel", text)
    return re.sub(r"^ *pytest\.param\([^\n]*marks=pytest\.mark\.slow\),\n", "", text, flags=re.M)


def definition(text: str, name: str, path: str) -> str:
    """The lines of a function or class, with its decorators."""
    for node in ast.parse(text).body:
        if getattr(node, "name", None) == name:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            return "".join(text.splitlines(keepends=True)[first - 1 : node.end_lineno])
    raise Refusal(f"{path} has no {name} any more; correct upstream/generate.py")


def without_unused_imports(text: str) -> str:
    """Drops imports at the top level none of whose names occurs again."""
    tree = ast.parse(text)
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    lines = text.splitlines(keepends=True)
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if not names & used:
                lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "".join(lines)


def for_python_38(text: str) -> str:
    """Annotations stay text, and what is evaluated all the same takes typing's names."""
    tree = ast.parse(text)
    text = re.sub(r"\.removeprefix\(([^()]*)\)", r'.replace(\1, "", 1)', text)
    aliases = [node for node in tree.body if isinstance(node, ast.Assign) and _generic(node.value)]
    names: set[str] = set()
    for alias in aliases:
        old = new = ast.get_source_segment(text, alias) or ""
        for builtin, name in BUILTINS.items():
            if re.search(rf"\b{builtin}\[", new):
                new = re.sub(rf"\b{builtin}\[", f"{name}[", new)
                names.add(name)
        text = text.replace(old, new)
    text = _typing(text, names)
    annotated = any(_annotations(node) for node in ast.walk(tree))
    return _with_future(text) if annotated else text


def _generic(node: ast.AST) -> bool:
    return isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name)


def _annotations(node: ast.AST) -> list[ast.AST]:
    return [found for field in ("annotation", "returns") if (found := getattr(node, field, None)) is not None]


def _typing(text: str, names: set[str]) -> str:
    """One import of typing, which has collections.abc's names in a form that can be subscripted in 3.8."""
    pattern = re.compile(r"^from (?:typing|collections\.abc) import ([^\n(]+)\n", re.M)
    for match in pattern.finditer(text):
        names = {*names, *(name.strip() for name in match[1].split(","))}
    if not names:
        return text
    line = f"from typing import {', '.join(sorted(names))}\n"
    first = pattern.search(text)
    if first is None:
        rest = _after_docstring(text)
        return text[:rest] + f"\n{line}\n" + text[rest:].lstrip("\n")
    text = text[: first.start()] + line.replace("from", "FROM", 1) + text[first.end() :]
    text = pattern.sub("", text).replace(line.replace("from", "FROM", 1), line)
    # in its place among the other imports of the standard library
    return re.sub(r"(?:^from [\w.]+ import [^\n(]+\n)+", _sorted, text, count=1, flags=re.M)


def _sorted(run: re.Match) -> str:
    return "".join(sorted(run[0].splitlines(keepends=True)))


def _with_future(text: str) -> str:
    rest = _after_docstring(text)
    return text[:rest] + "\nfrom __future__ import annotations\n\n" + text[rest:].lstrip("\n")


def _after_docstring(text: str) -> int:
    body = ast.parse(text).body
    if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        return sum(map(len, text.splitlines(keepends=True)[: body[0].end_lineno]))
    return 0


def imports_in_order(text: str) -> str:
    """What is imported from solo and tests comes last, sorted."""
    lines = text.splitlines(keepends=True)
    own = [
        node
        for node in ast.parse(text).body
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("solo", "tests")
    ]
    if not own:
        return text
    segments = sorted("".join(lines[node.lineno - 1 : node.end_lineno]) for node in own)
    for node in own[:-1]:
        lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    last = own[-1]
    before = "".join(lines[: last.lineno - 1]).rstrip("\n")
    start = f"{before}\n\n" if before else ""
    return start + "".join(segments) + "".join(lines[last.end_lineno :])
