"""Names for groups of tensors."""

import torch

Params = dict[str, torch.Tensor]
"""Parameters by name, as ``dict(module.named_parameters())`` gives them."""

Weights = tuple[torch.Tensor, ...]
"""The outer variables w."""
