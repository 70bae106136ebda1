"""What a bi-level problem is: an encoder, two losses behind it, and the weights to be learned."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Params = dict[str, torch.Tensor]
"""Parameters by name, as ``dict(module.named_parameters())`` gives them."""

Weights = tuple[torch.Tensor, ...]
"""The outer variables w."""


@dataclass(frozen=True)
class BilevelProblem:
    """One batch's bi-level problem, as pure functions of its parameters.

    The weights w enter behind the encoder. That is what makes the exact gradient cheap (see
    :class:`~metamask_plugin.bilevel.Exact`), and it holds for MetaMask, where w is the mask, and
    for ICL-MSR, where w is the semantic regulariser's output A.

    The functions must be pure: same arguments, same value, nothing changed outside.
    :class:`~metamask_plugin.bilevel.Functional` makes them so from modules.

    Attributes:
        encode: theta -> h, the features of the batch, any one shape.
        inner_loss: (h, phi, w) -> scalar, the loss that makes the trial step.
        outer_loss: (h, phi, w) -> scalar, the loss at the trial weights, minimised over w.
        encoder_params: theta.
        head_params: phi, everything behind the encoder that takes the trial step.
        weights: w.
    """

    encode: Callable[[Params], torch.Tensor]
    inner_loss: Callable[[torch.Tensor, Params, Weights], torch.Tensor]
    outer_loss: Callable[[torch.Tensor, Params, Weights], torch.Tensor]
    encoder_params: Params
    head_params: Params
    weights: Weights
