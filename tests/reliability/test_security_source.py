"""The source itself: nothing in it loads pickles, evaluates text, or speaks to a shell."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(
    path
    for part in ("metamask_plugin", "hydra_plugins", "benchmarks", "upstream", "tools", ".ci")
    for path in (ROOT / part).rglob("*.py")
) + sorted(ROOT.glob("*.py"))

NEVER = {
    "eval",
    "exec",
    "compile",
    "os.system",
    "os.popen",
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "joblib.load",
    "pandas.read_pickle",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.jit.load",
    "torch.hub.load",
    "torch.package.PackageImporter",
    "hydra.utils.instantiate",
    "hydra.utils.get_class",
    "hydra.utils.get_method",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
}
"""Calls that run what they are given, by their full names."""

OF_OBJECTS = {"load_from_checkpoint", "add_safe_globals"}
"""Methods of whatever object: Lightning's loader imports names from a checkpoint before 2.6.6."""

MAY_START_PROGRAMS = {
    "metamask_plugin/studies/trial.py": "git, for the commit of a record",
    "benchmarks": "each benchmark in a process of its own",
    "upstream": "git and black, over a copy of solo-learn",
    "tools": "pip and pytest, in environments of their own",
}
"""Where ``subprocess`` may be called, always with a list of words and without a shell."""


def offences(source, file="metamask_plugin/x.py"):
    """What a module does that it must not, as ``line: what``."""
    tree = ast.parse(source)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {
                (alias.asname or alias.name.split(".")[0]): (alias.name if alias.asname else None)
                for alias in node.names
            }
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full_name(node):
        if isinstance(node, ast.Attribute):
            before = full_name(node.value)
            return f"{before}.{node.attr}" if before else None
        return (names.get(node.id) or node.id) if isinstance(node, ast.Name) else None

    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        name = full_name(call.func) or ""
        method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
        given = {word.arg: word.value for word in call.keywords}
        true = {
            key for key, value in given.items() if isinstance(value, ast.Constant) and value.value is True
        }
        if name in NEVER or method in OF_OBJECTS:
            yield f"{call.lineno}: {name or method}"
        if name == "torch.load" and "weights_only" not in true:
            yield f"{call.lineno}: torch.load without weights_only=True"
        if name in ("numpy.load", "np.load") and "allow_pickle" in given:
            yield f"{call.lineno}: numpy.load with allow_pickle"
        if "shell" in given:
            yield f"{call.lineno}: a shell"
        if name.startswith("subprocess."):
            if not any(file.startswith(place) for place in MAY_START_PROGRAMS):
                yield f"{call.lineno}: {name}"
            if call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
                yield f"{call.lineno}: {name} with a line of text"


def test_no_source_does_what_it_must_not():
    assert len(SOURCES) > 100
    found = []
    for path in SOURCES:
        file = path.relative_to(ROOT).as_posix()
        found += [f"{file}:{offence}" for offence in offences(path.read_text(), file)]
    assert found == []


@pytest.mark.fault("security")
@pytest.mark.parametrize(
    "line",
    [
        "import torch; torch.load(path)",
        "import torch; torch.load(path, weights_only=False)",
        "import torch as t; t.load(path, weights_only=safe)",
        "from torch import load; load(path)",
        "import pickle; pickle.load(file)",
        "from pickle import loads as read; read(text)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text, yaml.Loader)",
        "import joblib; joblib.load(path)",
        "eval(text)",
        "exec(text)",
        "import os; os.system(text)",
        "import subprocess; subprocess.run(['git'])",
        "import subprocess; subprocess.run(words, shell=True)",
        "from subprocess import Popen; Popen(f'git {word}')",
        "import torch; torch.hub.load(name, model)",
        "from hydra.utils import instantiate; instantiate(cfg)",
        "Method.load_from_checkpoint(path)",
        "import torch; torch.serialization.add_safe_globals([Any])",
    ],
)
def test_what_must_not_stand_in_the_source_would_be_found(line):
    assert list(offences(line))
    harmless = "import torch, subprocess\ntorch.load(p, weights_only=True)\nsubprocess.run(['git', word])"
    assert list(offences(harmless, "upstream/x.py")) == []
