"""Bi-level self-supervised learning for solo-learn: MetaMask and ICL-MSR."""

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

SCRIPTS = Path(__file__).resolve().parent / "scripts"
"""The configs, ``pretrain`` and ``linear``: at the top of the repository, in the package once installed."""

EXPORTS = {
    "Baseline": "methods",
    "BilevelProblem": "bilevel",
    "DimensionalMask": "modules.dimensional_mask",
    "Exact": "bilevel",
    "Functional": "bilevel",
    "ICLMSR": "methods",
    "InnerStep": "bilevel",
    "MetaMask": "methods",
}
"""Names that can be imported from here, and their modules: torch is imported once one is asked for."""

__all__ = [*EXPORTS]


def __getattr__(name: str) -> Any:
    if name not in EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{EXPORTS[name]}"), name)
