"""Imports point down only (CONTRIBUTING.md)."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "metamask_plugin"

MAY_IMPORT = {
    "errors": set(),
    "renamed": {"errors"},
    "config": {"errors"},
    "retry": set(),
    "signals": set(),
    "losses": set(),
    "audit": {"errors"},
    "bilevel": set(),
    "modules": {"errors"},
    "data": {"config", "errors", "retry", "signals"},
    "tasks": {"errors", "losses", "modules"},
    "evaluation": {"config", "errors", "retry", "audit", "modules", "data"},
    "host": {"errors", "modules", "evaluation", "tasks"},
    "methods": {"errors", "renamed", "bilevel", "host", "losses", "modules", "tasks"},
    "training": {"config", "errors", "renamed", "retry", "signals", "audit", "data", "evaluation", "modules"},
    "studies": {
        *("config", "errors", "renamed", "retry", "audit", "data", "evaluation", "host", "modules"),
        "training",
    },
    "cli": {
        "config",
        "errors",
        "renamed",
        "signals",
        "audit",
        "bilevel",
        "data",
        "evaluation",
        "host",
        "methods",
        "modules",
        "studies",
        "retry",
        "tasks",
        "training",
    },
}


def imported_modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


@pytest.mark.parametrize("layer", sorted(MAY_IMPORT))
def test_imports_point_down(layer):
    module = PACKAGE / f"{layer}.py"
    files = [module] if module.exists() else sorted((PACKAGE / layer).rglob("*.py"))
    assert files
    for path in files:
        for name in imported_modules(path):
            if name.startswith("metamask_plugin."):
                used = name.split(".")[1]
                assert used == layer or used in MAY_IMPORT[layer], f"{path.name} imports {name}"


@pytest.mark.parametrize("layer", ["losses", "bilevel"])
def test_losses_and_bilevel_import_torch_alone(layer):
    for path in sorted((PACKAGE / layer).rglob("*.py")):
        roots = {module.split(".")[0] for module in imported_modules(path)}
        assert roots <= {"torch", "metamask_plugin"} | sys.stdlib_module_names, path.name


def test_no_module_imports_in_a_circle():
    """Not even for type checkers; ``prepare`` raises where one does. An import within a function is aside."""
    files = {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
    }
    files = {name.removesuffix(".__init__"): path for name, path in files.items() if ".scripts." not in name}
    graph = {}
    for module, path in files.items():
        body = ast.parse(path.read_text()).body
        body += [node for block in body if isinstance(block, ast.If) for node in block.body]
        nodes = [node for node in body if isinstance(node, ast.ImportFrom)]
        named = {f"{node.module}.{alias.name}": node.module for node in nodes for alias in node.names}
        graph[module] = {name if name in files else parent for name, parent in named.items()} & set(files)
    TopologicalSorter(graph).prepare()


def test_every_layer_is_listed():
    aside = ("__init__", "__main__", "__pycache__", "scripts", "py")  # py.typed
    found = {path.stem for path in PACKAGE.iterdir() if path.stem not in aside}
    assert found == set(MAY_IMPORT)


def test_only_the_host_knows_solo_learn():
    for path in PACKAGE.rglob("*.py"):
        if path.parent.name != "host":
            assert not any(m == "solo" or m.startswith("solo.") for m in imported_modules(path)), path


def test_the_audit_loads_no_training_code():
    heavy = ("lightning", "hydra", "omegaconf", "pydantic", "timm", "torchvision", "metamask_plugin.config")
    code = f"import sys, metamask_plugin.audit; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
