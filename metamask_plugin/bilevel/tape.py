"""What a forward pass has computed, kept for the forward-mode pass that follows it."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

LAYERS = frozenset({F.conv1d, F.conv2d, F.conv3d, F.linear})
"""Operations whose output is kept: bilinear in input and weight, and nearly all of a network's arithmetic."""

HALF = (torch.bfloat16, torch.float16)


class Kept(NamedTuple):
    """An operation's output, and its version counter at that time: later in-place changes show."""

    output: torch.Tensor
    version: int


class Moments(NamedTuple):
    """BatchNorm's batch statistics, (C,) each."""

    mean: torch.Tensor
    inverse_std: torch.Tensor


class Tape:
    """Spares a forward-mode pass what the pass before it has computed.

    The tangent of y = W * x is W * dx + dW * x. Forward mode computes y as well; where the same y has
    been computed by an earlier pass at the same point, two of three parts are left. Of train-mode BatchNorm
    the batch statistics are kept, and its tangent is computed by its backward kernel: see
    :func:`batch_norm_tangent`.

        with tape.recording():
            h = encode(theta)
        with tape.replaying():
            tangent of encode at theta

    An output that was changed in place since is computed anew. The convolutions and linear layers that
    autocast computed in bfloat16 are computed in bfloat16 here, where autocast itself would pass dual tensors
    by. Every other operation keeps the precision of its input, and where it meets two, takes the higher one.
    """

    def __init__(self):
        self.kept: list[Kept | Moments] = []

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
        outputs = [kept.output for kept in self.kept if isinstance(kept, Kept)]
        with _Replaying(remaining, lowered=any(output.dtype in HALF for output in outputs)):
            yield
        if next(remaining, None) is not None:
            raise RuntimeError("Tape: fewer convolutions and linear layers than were recorded")


class _Recording(TorchFunctionMode):
    def __init__(self, kept: list[Kept | Moments]):
        super().__init__()
        self.kept = kept

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.batch_norm:
            return self._batch_norm(*args, **(kwargs or {}))
        output = func(*args, **(kwargs or {}))
        if func in LAYERS:
            self.kept.append(Kept(output.detach(), output._version))
        return output

    def _batch_norm(self, x, mean, var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
        if not training or x.numel() == x.size(1):  # one value a channel: it says what is wrong
            return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
        y, *moments = torch.native_batch_norm(x, weight, bias, mean, var, training, momentum, eps)
        self.kept.append(Moments(*(moment.detach() for moment in moments)))
        return y


class _Replaying(TorchFunctionMode):
    def __init__(self, kept: Iterator[Kept | Moments], lowered: bool):
        super().__init__()
        self.kept, self.lowered = kept, lowered

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm and (args[5] if len(args) > 5 else kwargs.get("training", False)):
            return self._batch_norm(*args, **kwargs)
        if func not in LAYERS:
            if self.lowered:
                args, kwargs = _in_one_precision(func, args, kwargs)
            return func(*args, **kwargs)
        kept = self._next(Kept)
        return _dual(func, kept, *args, **kwargs)

    def _next(self, kind: type) -> Any:
        kept = next(self.kept, None)
        if not isinstance(kept, kind):
            raise RuntimeError("Tape: more convolutions and linear layers than were recorded")
        return kept

    def _batch_norm(
        self, input, mean, var, weight=None, bias=None, training=True, momentum=0.1, eps=1e-5
    ) -> torch.Tensor:
        moments = self._next(Moments)
        x, dx = forward_ad.unpack_dual(input)
        (g, dg), (b, db) = _unpacked(weight), _unpacked(bias)
        y = _normalised(x, moments, g, b, eps)
        dy = batch_norm_tangent(x, dx, g, dg, db, moments, eps)
        return y if dy is None else forward_ad.make_dual(y, dy)


def batch_norm_tangent(
    x: torch.Tensor,
    dx: torch.Tensor | None,
    weight: torch.Tensor | None,
    dweight: torch.Tensor | None,
    dbias: torch.Tensor | None,
    moments: Moments,
    eps: float = 1e-5,
) -> torch.Tensor | None:
    """The tangent of train-mode BatchNorm, by its backward kernel.

        J dx + dweight * x_hat + dbias,        x_hat = (x - mean) / std

    The Jacobian of a normalisation with batch statistics is symmetric: J = weight / std * (I - P), with P the
    projection onto 1 and x_hat, channel by channel. So J dx, a Jacobian-vector product, is also the
    vector-Jacobian product that PyTorch computes in one fused kernel. Its own forward mode takes some
    twenty elementwise kernels, and cannot mix precisions; here x may be bfloat16 and the weight float32.

    Args:
        x: input, shape (N, C, ...).
        dx: its tangent; None if it has none.
        weight: shape (C,), or None.
        dweight: its tangent, or None.
        dbias: tangent of the bias, shape (C,), or None.
        moments: of ``x``.
        eps: was added to the variance.

    Returns:
        Shaped as ``x``; None if nothing has a tangent.
    """
    affine = None
    if dweight is not None or dbias is not None:
        dweight, dbias = (torch.zeros_like(moments.mean) if d is None else d for d in (dweight, dbias))
        affine = _normalised(x, moments, dweight, dbias, eps)
    if dx is None:
        return affine
    backward = torch.ops.aten.native_batch_norm_backward
    through, _, _ = backward(dx, x, weight, None, None, *moments, True, eps, [True, False, False])
    return through if affine is None else through.add_(affine)


def _normalised(x: torch.Tensor, moments: Moments, weight, bias, eps: float) -> torch.Tensor:
    """weight * x_hat + bias, in one elementwise kernel."""
    variance = moments.inverse_std.pow(-2) - eps
    return F.batch_norm(x, moments.mean, variance, weight, bias, eps=eps)


def _unpacked(tensor: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if tensor is None else tuple(forward_ad.unpack_dual(tensor))


def _dual(func, kept: Kept, input, weight, bias=None, *args: Any, **kwargs: Any) -> torch.Tensor:
    """The recorded output with its tangent."""
    output, low = kept.output, kept.output.dtype
    (x, dx), (w, dw) = forward_ad.unpack_dual(input), forward_ad.unpack_dual(weight)
    b, db = _unpacked(bias)
    if output._version != kept.version:
        output = func(x.to(low), w.to(low), None if b is None else b.to(low), *args, **kwargs)
    tangent = None
    if dx is not None:
        tangent = func(dx.to(low), w.to(low), None, *args, **kwargs)
    if dw is not None:
        term = func(x.to(low), dw.to(low), None, *args, **kwargs)
        tangent = term if tangent is None else tangent.add_(term)
    if tangent is not None and tangent.shape != output.shape:
        raise RuntimeError(
            f"Tape: recorded an output of shape {tuple(output.shape)}, now {tuple(tangent.shape)}"
        )
    if db is not None:
        channel = output.dim() + 1 - weight.dim()  # the spatial axes of a convolution lie behind it
        shape = [-1 if axis == channel else 1 for axis in range(output.dim())]
        db = db.to(low).view(shape)
        tangent = db.expand_as(output) if tangent is None else tangent.add_(db)
    return output if tangent is None else forward_ad.make_dual(output, tangent)


def _in_one_precision(func, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """The arguments in their highest precision, or in that of the tensor that is changed in place.

    Forward mode does not mix two.
    """
    floats = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if len({t.dtype for t in floats}) < 2:
        return args, kwargs
    name = func.__name__
    in_place = name.startswith(("__i", "__setitem__")) or name.endswith("_") and not name.endswith("__")
    common = floats[0].dtype if in_place else reduce(torch.promote_types, (t.dtype for t in floats))

    def cast(leaf):
        return leaf.to(common) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf

    return tree_map(cast, (args, kwargs))
