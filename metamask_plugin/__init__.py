"""Bi-level self-supervised learning for solo-learn: MetaMask and ICL-MSR."""

from pathlib import Path

__version__ = "0.1.0"

SCRIPTS = Path(__file__).resolve().parent / "scripts"
"""The configs, ``pretrain`` and ``linear``: at the top of the repository, in the package once installed."""
