"""Losses as pure functions: tensors in, scalar out. Imports torch and nothing else."""

from metamask_plugin.losses.nt_xent import nt_xent_loss
from metamask_plugin.losses.redundancy_reduction import cross_correlation, redundancy_reduction_loss

__all__ = ["cross_correlation", "nt_xent_loss", "redundancy_reduction_loss"]
