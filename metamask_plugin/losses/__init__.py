"""Losses as pure functions: tensors in, scalar out. Imports torch and nothing else."""

from metamask_plugin.losses.backdoor import backdoor_adjusted_loss
from metamask_plugin.losses.cmc import cmc_loss
from metamask_plugin.losses.contrastive import contrastive_loss, multi_view_loss
from metamask_plugin.losses.debiased import debiased_negative_mass
from metamask_plugin.losses.hsic import hsic_loss
from metamask_plugin.losses.moco import moco_loss
from metamask_plugin.losses.nnclr import nnclr_loss
from metamask_plugin.losses.nt_xent import nt_xent_loss
from metamask_plugin.losses.pairs import byol_loss, mean_over_pairs, negative_cosine_loss
from metamask_plugin.losses.redundancy_reduction import cross_correlation, redundancy_reduction_loss
from metamask_plugin.losses.relic import relic_loss
from metamask_plugin.losses.ressl import relation_loss
from metamask_plugin.losses.sinkhorn import sinkhorn_codes
from metamask_plugin.losses.swav import multi_crop_loss, swapped_prediction_loss
from metamask_plugin.losses.uniformity import uniformity_loss
from metamask_plugin.losses.whitening import whitened_mse_loss

__all__ = [
    "backdoor_adjusted_loss",
    "byol_loss",
    "cmc_loss",
    "contrastive_loss",
    "cross_correlation",
    "debiased_negative_mass",
    "hsic_loss",
    "mean_over_pairs",
    "moco_loss",
    "multi_crop_loss",
    "multi_view_loss",
    "negative_cosine_loss",
    "nnclr_loss",
    "nt_xent_loss",
    "redundancy_reduction_loss",
    "relation_loss",
    "relic_loss",
    "sinkhorn_codes",
    "swapped_prediction_loss",
    "uniformity_loss",
    "whitened_mse_loss",
]
