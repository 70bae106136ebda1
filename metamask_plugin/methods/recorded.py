"""Watching an encoder work inside a step that somebody else makes."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from metamask_plugin.bilevel import Tape
from metamask_plugin.errors import check


@contextmanager
def recorded(encoder: nn.Module, tape: Tape) -> Iterator[None]:
    """Within it, every call of the encoder is recorded on the tape, and nothing else is.

    Args:
        encoder: the encoder.
        tape: takes up its convolutions and linear layers.

    Raises:
        UserError: if the encoder draws random numbers: the pass could not be repeated in forward mode.
    """
    recordings = []

    def start(module, args):
        recordings.append((_random_state(args[0]), tape.recording()))
        recordings[-1][1].__enter__()

    def stop(module, args, output):
        state, recording = recordings.pop()
        recording.__exit__(None, None, None)
        check(
            output is None or torch.equal(state, _random_state(args[0])),
            "method_kwargs.meta.when",
            "after_step or epoch_end with an encoder that draws random numbers (dropout, stochastic depth)",
            "before_step",
        )

    hooks = [
        encoder.register_forward_pre_hook(start),
        encoder.register_forward_hook(stop, always_call=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _random_state(images: torch.Tensor) -> torch.Tensor:
    return torch.cuda.get_rng_state(images.device) if images.is_cuda else torch.get_rng_state()
