"""What a forward pass has computed, kept for the forward-mode pass that follows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

LAYERS = frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear})
"""Operations whose output is kept: bilinear in input and weight, and nearly all of a network's arithmetic."""


class Kept(NamedTuple):
    """An operation's output, and its version counter at that time: later in-place changes show."""

    output: torch.Tensor
    version: int


class Tape:
    """Spares a forward-mode pass the convolutions and linear layers of the pass before it.

    The tangent of y = W * x is W * dx + dW * x. Forward mode computes y as well; where the same y has
    been computed by an earlier pass at the same point, two of three parts are left.

        with tape.recording():
            h = encode(theta)
        with tape.replaying():
            tangent of encode at theta

    An output that was changed in place since is computed anew. The products follow the precision of the
    recorded pass: what was recorded under autocast in bfloat16 is multiplied in bfloat16 here, where
    autocast itself would pass dual tensors by; everything else keeps the precision of its input.
    """

    def __init__(self):
        self.kept: list[Kept] = []

    @contextmanager
    def recording(self) -> Iterator[None]:
        with _Recording(self.kept):
            yield

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Raises:
        RuntimeError: if the pass is not the recorded one.
        """
        remaining = iter(self.kept)
        with _Replaying(remaining):
            yield
        if next(remaining, None) is not None:
            raise RuntimeError("Tape: fewer convolutions and linear layers than were recorded")


class _Recording(TorchFunctionMode):
    def __init__(self, kept: list[Kept]):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in LAYERS:
            self.kept.append(Kept(output.detach(), output._version))
        return output


class _Replaying(TorchFunctionMode):
    def __init__(self, kept: Iterator[Kept]):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func not in LAYERS:
            return func(*args, **kwargs)
        kept = next(self.kept, None)
        if kept is None:
            raise RuntimeError("Tape: more convolutions and linear layers than were recorded")
        if kept.output._version != kept.version:
            return func(*args, **kwargs)
        return _dual(func, kept.output, *args, **kwargs)


def _dual(func, output: torch.Tensor, input, weight, bias=None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The recorded output with its tangent."""
    low = output.dtype
    x, dx = forward_ad.unpack_dual(input)
    w, dw = forward_ad.unpack_dual(weight)
    terms = []
    if dx is not None:
        terms.append(func(dx.to(low), w.to(low), None, *args, **kwargs))
    if dw is not None:
        terms.append(func(x.to(low), dw.to(low), None, *args, **kwargs))
    if terms and terms[0].shape != output.shape:
        raise RuntimeError(
            f"Tape: recorded an output of shape {tuple(output.shape)}, now {tuple(terms[0].shape)}"
        )
    if bias is not None and (db := forward_ad.unpack_dual(bias).tangent) is not None:
        channel = output.dim() + 1 - weight.dim()  # the spatial axes of a convolution lie behind it
        shape = [-1 if axis == channel else 1 for axis in range(output.dim())]
        terms.append(db.to(low).view(shape).expand_as(output))
    primal = output.to(x.dtype)
    return forward_ad.make_dual(primal, sum(terms).to(x.dtype)) if terms else primal
