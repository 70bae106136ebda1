"""Precisions that benchmarks compare, and TensorFloat-32 where the hardware has none."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

MATRIX_ARGUMENTS = {
    aten.convolution.default: (0, 1),
    aten.convolution_backward.default: (0, 1, 2),
    aten.mm.default: (0, 1),
    aten.bmm.default: (0, 1),
    aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2),
}
"""Operators that TensorFloat-32 speeds up, and which of their arguments it rounds."""


@contextmanager
def matrix_precision(name: str) -> Iterator[None]:
    """float32 arithmetic of convolutions and matrix products: ``tf32``, or in full for any other name.

    On a GPU that is a setting of its libraries. On the CPU ``tf32`` is emulated by :class:`RoundedInputs`:
    the same errors, none of the speed.
    """
    if not torch.cuda.is_available():
        with RoundedInputs() if name == "tf32" else nullcontext():
            yield
        return
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


class RoundedInputs(TorchDispatchMode):
    """Rounds what goes into convolutions and matrix products to TensorFloat-32's 10 bits of mantissa.

    Below autograd, so that backward, double-backward and forward-mode passes round as well. Sums stay in
    float32, as in the hardware.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        places = MATRIX_ARGUMENTS.get(func, ())
        args = [rounded(arg) if place in places else arg for place, arg in enumerate(args)]
        return func(*args, **(kwargs or {}))


def rounded(x: torch.Tensor) -> torch.Tensor:
    """float32 to the nearest number with 10 bits of mantissa; other types as they are."""
    if x.dtype != torch.float32:
        return x
    # half a unit in the last place that stays, then the 13 bits below it away
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)
