"""Bi-level self-supervised learning for solo-learn: MetaMask and ICL-MSR."""

__version__ = "0.1.0"
