"""An encoder compiled where it trains, and as it was everywhere else."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException

NAMED_MODES = ("reduce-overhead", "max-autotune")
"""torch.compile's own."""
MODES = ("False", "True", *NAMED_MODES)
"""Values of ``performance.compile``, as text."""


class CompiledForward:
    """Stands in for a module's ``forward``: compiled by ``torch.compile`` in training mode, else as it was.

    Evaluation stays as it was, since its last batch has a size of its own and would be compiled again. So do
    passes within :meth:`paused`: what has been compiled has neither a forward mode nor a second derivative,
    and a pass may be differentiated only once (with ``retain_graph`` the second result is wrong, without an
    error, in torch 2.15). Where compiling fails, a warning says why, and the module goes on uncompiled.

    The module's parameters, names and hooks do not change, and :meth:`remove` leaves no trace.

    Args:
        module: its ``forward`` is replaced, on this instance.
        mode: True, or one of torch.compile's modes: ``reduce-overhead`` (CUDA graphs), ``max-autotune``.
        backend: of torch.compile.
    """

    def __init__(self, module: nn.Module, mode: bool | str = True, backend: str = "inductor"):
        self.module = module
        self.eager = module.forward
        options = {} if mode is True else {"mode": mode}
        # batches of one size: a symbolic size would only cost speed
        self.compiled = torch.compile(module.forward, backend=backend, dynamic=False, **options)
        self._paused = False
        module.forward = self

    def __call__(self, *args, **kwargs):
        if self._paused or not self.module.training:
            return self.eager(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:
            reason = " ".join(str(error).strip().splitlines()[:2])
            warnings.warn(
                f"performance.compile: {type(self.module).__name__} cannot be compiled here and goes on "
                f"without: {reason}",
                stacklevel=2,
            )
            self.compiled = self.eager
            return self.eager(*args, **kwargs)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it, the module is as it was."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def remove(self) -> None:
        """Gives the module its ``forward`` back."""
        del self.module.forward
