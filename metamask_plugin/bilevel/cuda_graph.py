"""A function of tensors as one CUDA graph."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class CudaGraph:
    """Launches all kernels of a function at once.

    A meta step is some thousands of small kernels, and the host takes longer to launch them than the device
    to run them. The first calls run as they are. Then one is captured, and from there on replayed: its
    inputs are copied to where the captured call had them, and everything else (parameters, buffers,
    optimiser state) is read where it lies. So the function must do the same each time: branch on no value
    that changes, keep no count, neither wait for the device nor communicate with other processes.

    A function that draws random numbers is never captured: a replay would not repeat its draws within one
    meta step, as :class:`~metamask_plugin.bilevel.Functional` does. A call whose tensors differ in shape
    from the captured ones is not replayed. Both run as they are, and so does everything on a CPU.

    Args:
        function: takes and returns tensors, or lists, tuples and dicts of them; the first tensor's device
            is that of all. What is no tensor must be the same in every call.
        warmup: calls before the capture, >= 1: cuDNN chooses its kernels, optimisers make their state.

    Raises:
        ValueError: for a warmup < 1.

    Example:
        >>> step = CudaGraph(lambda x, lr: [torch.autograd.grad(loss(x), weights)[0] * lr])
        >>> (update,) = step(x, torch.full((), 0.1, device="cuda"))
    """

    def __init__(self, function: Callable[..., Any], warmup: int = 3):
        if warmup < 1:
            raise ValueError(f"CudaGraph: warmup must be >= 1, got {warmup}")
        self.function, self.left = function, warmup
        self.draws = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self._args: tuple = ()
        self._output: Any = None

    def __call__(self, *args: Any) -> Any:
        inputs = _tensors(args)
        if self.draws or not self.on_gpu(inputs[0]):
            return self.function(*args)
        if self.left > 0:
            self.left -= 1
            with _Draws() as draws:
                output = self.function(*args)
            self.draws |= draws.found
            return output
        if self.graph is None:
            self._capture(args)
        captured = _tensors(self._args)
        if [x.shape for x in inputs] != [x.shape for x in captured]:
            return self.function(*args)
        for static, x in zip(captured, inputs):
            static.copy_(x)
        self.graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, self._output)

    def _capture(self, args: tuple) -> None:
        self._args = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), args)
        self.graph = torch.cuda.CUDAGraph()
        # the autograd engine and loaders have threads of their own
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self._output = self.function(*self._args)

    @staticmethod
    def on_gpu(x: torch.Tensor) -> bool:
        return x.is_cuda


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Draws(TorchDispatchMode):
    """Notices random numbers."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))
