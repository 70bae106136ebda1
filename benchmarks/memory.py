"""Peak memory of a call, on a GPU as its allocator knows it, on the CPU counted tensor by tensor."""

import gc
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Memory(NamedTuple):
    """Bytes of live tensors: before a call, and at its highest point, what was there before included."""

    resident: int
    peak: int


def peak_memory(call: Callable[[], Any], resident: Iterable[torch.Tensor] = ()) -> Memory:
    """Peak of live tensor bytes during one call.

    Args:
        call: is made once; make it once before, if it allocates state on its first call.
        resident: tensors that are there before and count (parameters, gradients, optimiser state, images).
            On CUDA the allocator knows what is there, and this is not looked at.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return Memory(before, torch.cuda.max_memory_allocated())
    with LiveBytes(resident) as live:
        before = live.now
        call()
    return Memory(before, live.peak)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive on the CPU, where no allocator can be asked.

    Deterministic: it counts storages as operators return them and until they are freed. It does not see
    what an operator takes and gives back within itself (a convolution's scratch memory).

    Args:
        resident: tensors that count from the start; a storage that several share counts once.

    Attributes:
        now: bytes alive.
        peak: the most so far.
    """

    def __init__(self, resident: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()
        for tensor in resident:
            self._count(tensor)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata  # the address of the storage itself: views of one storage have one
        if key in self._known:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size
