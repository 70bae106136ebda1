"""A module as a constant: gradients pass through it, but not into it."""

import torch
from torch import nn


def without_gradient(module: nn.Module, *inputs: torch.Tensor):
    """Calls a module with its parameters detached.

    Also right where the module is itself being called with other parameters (``functional_call``): it is
    those that are detached.

    Args:
        module: its buffers are used, and written, as ever.
        inputs: what it takes; gradients flow back into them.
    """
    fixed = {name: parameter.detach() for name, parameter in module.named_parameters()}
    return torch.func.functional_call(module, fixed, inputs)
