"""Losses as pure functions: tensors in, scalar out. Imports torch and nothing else."""

from metamask_plugin.losses.backdoor import backdoor_adjusted_loss, stratified_loss
from metamask_plugin.losses.contrastive import contrastive_loss
from metamask_plugin.losses.nt_xent import nt_xent_loss
from metamask_plugin.losses.redundancy_reduction import cross_correlation, redundancy_reduction_loss
from metamask_plugin.losses.uniformity import uniformity_loss

__all__ = [
    "backdoor_adjusted_loss",
    "contrastive_loss",
    "cross_correlation",
    "nt_xent_loss",
    "redundancy_reduction_loss",
    "stratified_loss",
    "uniformity_loss",
]
