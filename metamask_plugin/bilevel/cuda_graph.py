"""A function of tensors as one CUDA graph."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class CaptureError(RuntimeError):
    """A function that waits for the device, or does something else that no CUDA graph can hold."""


class CudaGraph:
    """Launches all kernels of a function at once.

    A meta step is some thousands of small kernels, and the host takes longer to launch them than the device
    to run them. The first calls run as they are. Then one is captured, and from there on replayed: its
    inputs are copied to where the captured call had them, and everything else (parameters, buffers,
    optimiser state) is read where it lies. So the function must do the same each time: branch on no value
    that changes, keep no count, neither wait for the device nor communicate with other processes.

    A function that draws random numbers is not captured, with a warning: a replay would not repeat its draws
    within one meta step, as :class:`~metamask_plugin.bilevel.Functional` does. A call whose tensors differ in
    shape from the captured ones is not replayed. Both run as they are, and so does everything on a CPU.

    Args:
        function: takes and returns tensors, or lists, tuples and dicts of them; the first tensor's device
            is that of all. What is no tensor must be the same in every call.
        warmup: calls of one shape before the capture, >= 1: cuDNN chooses its kernels, optimisers make their
            state.

    Raises:
        ValueError: for a warmup < 1.
        CaptureError: by the call that is to be captured and cannot be.

    Example:
        >>> doubled = CudaGraph(lambda x: x * 2)
        >>> doubled(torch.ones(2))  # on a GPU replayed from the fourth call on
        tensor([2., 2.])
    """

    def __init__(self, function: Callable[..., Any], warmup: int = 3):
        if warmup < 1:
            raise ValueError(f"CudaGraph: warmup must be >= 1, got {warmup}")
        self.function, self.warmup, self.left = function, warmup, warmup
        self.draws = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self._args: tuple = ()
        self._shapes: list[torch.Size] = []
        self._output: Any = None

    def __call__(self, *args: Any) -> Any:
        inputs = _tensors(args)
        if self.draws or not self.on_gpu(inputs[0]):
            return self.function(*args)
        shapes = [x.shape for x in inputs]
        if shapes != self._shapes:
            if self.graph is not None:
                return self.function(*args)
            self._shapes, self.left = shapes, self.warmup
        if self.left > 0:
            self.left -= 1
            with _Draws() as draws:
                output = self.function(*args)
            self.draws = draws.found
            if self.draws:
                warnings.warn("CudaGraph: what draws random numbers is not captured", stacklevel=2)
            return output
        if self.graph is None:
            self.graph = self._capture(args)
        for static, x in zip(_tensors(self._args), inputs):
            static.copy_(x)
        self.graph.replay()
        return tree_map_only(torch.Tensor, torch.clone, self._output)

    def _capture(self, args: tuple) -> torch.cuda.CUDAGraph:
        self._args = tree_map_only(torch.Tensor, lambda x: x.detach().clone(), args)
        graph = torch.cuda.CUDAGraph()
        try:  # the autograd engine and loaders have threads of their own
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._output = self.function(*self._args)
        except RuntimeError as error:
            raise CaptureError(f"CudaGraph: the function cannot be captured: {error}") from error
        return graph

    @staticmethod
    def on_gpu(x: torch.Tensor) -> bool:
        return x.is_cuda


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class _Draws(TorchDispatchMode):
    """Notices random numbers."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.found |= torch.Tag.nondeterministic_seeded in func.tags and _dropout(func, args, kwargs) != 0
        return func(*args, **kwargs)


def _dropout(func, args: tuple, kwargs: dict[str, Any]) -> float | None:
    """The rate of dropout in an attention kernel, which draws nothing at 0; None for other operators."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return args[place] if place < len(args) else kwargs.get("dropout_p", argument.default_value)
    return None
