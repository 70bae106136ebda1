"""The target network of momentum tasks: an exponential moving average of encoder and head."""

import copy
import math

import torch
from torch import nn


class TargetNetwork(nn.Module):
    """xi <- m xi + (1 - m) theta, once an optimiser step. BYOL [0], MoCo [1].

    Its weights never require a gradient; its BatchNorm keeps statistics of its own, from its own forwards.

    Args:
        trunk: the online encoder, copied.
        head: the online projection head, copied.

    [0] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.
    [1] He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020.
    """

    def __init__(self, trunk: nn.Module, head: nn.Module):
        super().__init__()
        self.trunk, self.head = copy.deepcopy(trunk), copy.deepcopy(head)
        self.requires_grad_(False)

    @torch.no_grad()
    def update(self, trunk: nn.Module, head: nn.Module, momentum: float) -> None:
        """One step towards the online networks.

        Args:
            trunk: the online encoder.
            head: the online head.
            momentum: m in [0, 1]; 1 leaves the target as it is.
        """
        for mine, online in ((self.trunk, trunk), (self.head, head)):
            for target, source in zip(mine.parameters(), online.parameters()):
                target.lerp_(source.to(target.dtype), 1 - momentum)


def cosine_momentum(base: float, final: float, progress: float) -> float:
    """m at a share of the training: from ``base`` to ``final`` along half a cosine, BYOL Section 3.2.

    Args:
        base: m at the start.
        final: m at the end.
        progress: share of all steps that are done, in [0, 1].
    """
    return final - (final - base) * (math.cos(math.pi * progress) + 1) / 2
