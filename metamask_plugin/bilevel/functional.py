"""Modules as pure functions of their parameters."""

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from metamask_plugin.bilevel.params import Params


class Functional:
    """Calls a module with other parameters and leaves no trace on it.

    ``torch.func.functional_call`` alone is not pure: BatchNorm writes its running statistics in
    place, and dropout moves the random number generator. So every call gets copies of the buffers,
    and starts from the same generator state, which it also leaves behind: all evaluations of one
    meta step draw the same dropout masks. Views of one evaluation draw different ones: :meth:`each`.

    Args:
        module: the module; its mode (train or eval) is kept.
        names: the parameters to expose, where not all of the module's take part; the others stay as
            the module has them.

    Attributes:
        params: the parameters that train, by name, detached and shared with the module.
    """

    def __init__(self, module: nn.Module, names: Collection[str] | None = None):
        self.module = module
        self.params: Params = {
            name: param.detach()
            for name, param in module.named_parameters()
            if param.requires_grad and (names is None or name in names)
        }

    def __call__(self, params: Params, *args, **kwargs):
        with self._random_state_kept():
            return self._call(params, *args, **kwargs)

    def each(self, params: Params, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Calls the module on each input, such as the views of a batch, within one random state.

        Inputs draw different dropout masks, one after the other, as in a regular step.
        """
        with self._random_state_kept():
            return [self._call(params, x) for x in inputs]

    def _call(self, params: Params, *args, **kwargs):
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        return torch.func.functional_call(self.module, {**params, **buffers}, args, kwargs)

    @property
    def devices(self) -> set[torch.device]:
        """Where the module is, whichever of its parameters are exposed."""
        return {tensor.device for tensor in (*self.module.parameters(), *self.module.buffers())}

    def _random_state_kept(self) -> AbstractContextManager:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return nullcontext()  # a captured call draws nothing, see CudaGraph; do not ask the generator
        return torch.random.fork_rng(devices=[device for device in self.devices if device.type == "cuda"])
