"""Groups of tensors."""

import torch

Params = dict[str, torch.Tensor]
"""Parameters by name, as ``dict(module.named_parameters())`` gives them."""

Weights = tuple[torch.Tensor, ...]
"""The outer variables w."""


def leaves(params: Params) -> Params:
    """The same values as fresh leaves of the autograd graph; nothing flows back to the originals."""
    return {name: param.detach().requires_grad_() for name, param in params.items()}
