"""BatchNorm's running statistics, where a forward pass is not to count."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


@contextmanager
def frozen_bn_stats(module: nn.Module) -> Iterator[None]:
    """Within it, forwards in training mode leave the running mean and variance as they are."""
    momenta = [(norm, norm.momentum) for norm in module.modules() if isinstance(norm, _BatchNorm)]
    for norm, _ in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
