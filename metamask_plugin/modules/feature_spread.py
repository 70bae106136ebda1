"""How far features are from collapse."""

import torch
from torch import nn


def feature_std(feats: torch.Tensor) -> torch.Tensor:
    """sqrt(D) times the mean standard deviation of a dimension, of features of unit length; a scalar.

    As SimSiam [0] measures it: 0 when all images have the same features, 1 when they are spread over the
    sphere in all directions. Features behind a ReLU are all positive and stay below.

    Args:
        feats: shape (N, D).

    [0] Chen and He, *Exploring Simple Siamese Representation Learning*, CVPR 2021, Section 4.1.
    """
    directions = nn.functional.normalize(feats, dim=1)
    return directions.std(dim=0, unbiased=False).mean() * feats.shape[1] ** 0.5
