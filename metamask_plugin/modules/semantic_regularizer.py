"""The meta semantic regulariser f_msr: from an image to n weight vectors over an encoder's channels."""

import torch
from torch import nn

from metamask_plugin.errors import check, choose

ACTIVATIONS = {"sigmoid": torch.sigmoid, "softplus": nn.functional.softplus, "none": lambda logits: logits}


class SemanticRegularizer(nn.Module):
    """f_msr of [0]: A = f_msr(X), a row of channel weights for each semantic stratum (Section 4.1).

    The paper says "implemented by convolutional neural network" and no more. Here: any network with
    pooled features, one linear layer to n * C numbers, and a sigmoid, because each vector is to pick a
    *subset* of the channels ("the weights for this related subset of channels should be large, and the
    weights for channels that are outside of the subset should be small"). At initialisation all weights
    are near 1/2, so that every stratum starts as the whole representation.

    Its parameters do not require a gradient: the regular step holds f_msr fixed (Algorithm 1 of [0]),
    and outside the main optimiser it is also outside DDP's reducer. The meta step calls it on leaves of
    its own.

    Args:
        trunk: images (N, 3, H, W) to features (N, ``trunk.num_features``).
        channels: C, what the vectors weigh.
        n: number of weight vectors; the paper takes 6, and 14 for semi-supervised training.
        activation: ``sigmoid``, ``softplus`` or ``none`` (weights may be negative).

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.

    Example:
        >>> trunk = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> trunk.num_features = 3
        >>> regularizer = SemanticRegularizer(trunk, channels=8, n=6)
        >>> regularizer(torch.ones(4, 3, 32, 32)).shape
        torch.Size([4, 6, 8])
    """

    def __init__(self, trunk: nn.Module, channels: int, n: int = 6, activation: str = "sigmoid"):
        super().__init__()
        check(isinstance(n, int) and n >= 1, "method_kwargs.regularizer.n", "an integer >= 1", n)
        choose("method_kwargs.regularizer.activation", activation, ACTIVATIONS)
        self.trunk = trunk
        self.to_weights = nn.Linear(trunk.num_features, n * channels)
        self.n, self.channels, self.activation = n, channels, activation
        self.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """A, shape (N, n, C), of un-augmented images (N, 3, H, W)."""
        logits = self.to_weights(self.trunk(images)).unflatten(1, (self.n, self.channels))
        return ACTIVATIONS[self.activation](logits)


@torch.no_grad()
def weight_statistics(weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """What A has become, as scalars to log.

    ``msr_overlap``: mean cosine between two different vectors of an image (1: all strata are one);
    ``msr_mean``; ``msr_channel_std``: spread of a vector's weights over the channels;
    ``msr_image_std``: spread of a weight over the images (0: A does not look at the image).

    Args:
        weights: A, shape (N, n, C).
    """
    a = nn.functional.normalize(weights.float(), dim=-1)
    n = a.shape[1]
    off_diagonal = (a @ a.transpose(1, 2)).sum(dim=(1, 2)) - n
    return {
        "msr_overlap": (off_diagonal / max(1, n * (n - 1))).mean(),
        "msr_mean": weights.mean(),
        "msr_channel_std": weights.std(dim=2, unbiased=False).mean(),
        "msr_image_std": weights.std(dim=0, unbiased=False).mean(),
    }
