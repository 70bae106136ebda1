"""A function of tensors as one CUDA graph."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Tensors = tuple[torch.Tensor, ...]


class CudaGraph:
    """Launches all kernels of a function at once.

    A meta step is some thousands of small kernels, and Python takes longer to launch them than the device to
    run them. The first calls run as they are; then one is captured, and from there on replayed: inputs
    are copied to where the captured call had them, everything else (parameters, buffers, optimiser state) is read
    where it lies. The function must therefore do the same each time, branch on no value that changes, and
    neither wait for the device nor communicate with other processes.

    A function that draws random numbers is never captured: a replay would not repeat its own draws within
    one meta step, as :class:`~metamask_plugin.bilevel.Functional` does. Nor is a call whose inputs differ
    in shape from the captured one's; both run as they are, and so does everything on a CPU.

    Args:
        function: tensors to tensors, all on one device.
        warmup: calls before the capture, >= 1: cuDNN chooses its kernels, optimisers make their state.
    """

    def __init__(self, function: Callable[..., Tensors], warmup: int = 3):
        if warmup < 1:
            raise ValueError(f"CudaGraph: warmup must be >= 1, got {warmup}")
        self.function, self.left = function, warmup
        self.draws = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self._inputs: Tensors = ()
        self._outputs: Tensors = ()

    def __call__(self, *inputs: torch.Tensor) -> Tensors:
        if self.left > 0:
            self.left -= 1
            if self.left > 0 or not inputs[0].is_cuda:
                return self.function(*inputs)
            with _Draws() as draws:
                outputs = self.function(*inputs)
            self.draws = draws.found
            return outputs
        if self.draws or not inputs[0].is_cuda:
            return self.function(*inputs)
        if self.graph is None:
            self._capture(inputs)
        if [x.shape for x in inputs] != [x.shape for x in self._inputs]:
            return self.function(*inputs)
        for static, x in zip(self._inputs, inputs):
            static.copy_(x)
        self.graph.replay()
        return tuple(output.clone() for output in self._outputs)

    def _capture(self, inputs: Tensors) -> None:
        self._inputs = tuple(x.detach().clone() for x in inputs)
        self.graph = torch.cuda.CUDAGraph()
        # the autograd engine and loaders have threads of their own
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._outputs = self.function(*self._inputs)


class _Draws(TorchDispatchMode):
    """Notices random numbers."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
