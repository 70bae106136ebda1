"""The examples of docstrings: doctest runs all of them, and whatever a reader may look up first has one."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest
import torch

from metamask_plugin import losses, methods, tasks
from metamask_plugin.bilevel import estimators, inner_step
from metamask_plugin.modules.dimensional_mask import DimensionalMask
from metamask_plugin.modules.semantic_regularizer import SemanticRegularizer

PACKAGE = Path(importlib.import_module("metamask_plugin").__file__).parent
OPTIONAL = ("metamask_plugin.data.dali", "metamask_plugin.host.solo")
"""What may lack the package that it is for."""


MODULES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if not name.startswith(OPTIONAL):
            raise
        pytest.skip(str(error))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = doctest.testmod(module)
    assert found.attempted > 0 and found.failed == 0


def concrete(module, base):
    """The classes of a module below ``base``, but for abstract ones."""
    for _, cls in inspect.getmembers(module, inspect.isclass):
        if cls.__module__ == module.__name__ and issubclass(cls, base) and not inspect.isabstract(cls):
            yield cls


WITH_EXAMPLES = [
    *(getattr(losses, name) for name in losses.__all__),
    *(tasks.Task, tasks.MomentumTask, *tasks.TASKS.values()),
    *concrete(estimators, estimators.Estimator),
    *concrete(inner_step, inner_step.PlainStep),
    *(inner_step.MatchedStep, inner_step.InnerStep, inner_step.rule_following),
    *(DimensionalMask, SemanticRegularizer),
    *(methods.MetaMask, methods.ICLMSR, methods.Baseline, methods.Supervised),
]


@pytest.mark.parametrize("named", WITH_EXAMPLES, ids=lambda named: named.__name__)
def test_there_is_an_example(named):
    assert "Example:\n    >>> " in inspect.getdoc(named)
