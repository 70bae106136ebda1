"""Modules as pure functions of their parameters."""

from collections.abc import Collection

import torch
from torch import nn

from metamask_plugin.bilevel.params import Params


class Functional:
    """Calls a module with other parameters and leaves no trace on it.

    ``torch.func.functional_call`` alone is not pure: BatchNorm writes its running statistics in
    place, and dropout moves the random number generator. So every call gets copies of the buffers,
    and starts from the same generator state, which it also leaves behind: all evaluations of one
    meta step draw the same dropout masks.

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
        buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            # a captured call draws nothing, see CudaGraph, and the generator must not be asked
            return torch.func.functional_call(self.module, {**params, **buffers}, args, kwargs)
        cuda = {tensor.device for tensor in params.values() if tensor.is_cuda}
        with torch.random.fork_rng(devices=list(cuda)):
            return torch.func.functional_call(self.module, {**params, **buffers}, args, kwargs)
