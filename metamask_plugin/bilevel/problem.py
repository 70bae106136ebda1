"""What a bi-level problem is: an encoder, two losses behind it, and the outer parameters to be learned."""

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from metamask_plugin.bilevel.ranks import Ranks
from metamask_plugin.bilevel.tape import Tape

Params = dict[str, torch.Tensor]
"""Parameters by name, as ``dict(module.named_parameters())`` gives them."""

OuterParams = tuple[torch.Tensor, ...]
"""The outer variables w."""


def leaves(params: Params) -> Params:
    """The same values as fresh leaves of the autograd graph; nothing flows back to the originals."""
    return {name: param.detach().requires_grad_() for name, param in params.items()}


class Functional:
    """Calls a module with other parameters and leaves no trace on it.

    ``torch.func.functional_call`` alone is not pure: BatchNorm writes its running statistics in place, and
    dropout advances the random number generator. So every call gets copies of the buffers and starts from the
    same generator state, which it also leaves behind: all evaluations of one meta step draw the same dropout
    masks. Views of one evaluation draw different ones: :meth:`each`.

    Args:
        module: the module; its mode (train or eval) is kept.
        names: the parameters to expose, where not all of the module's take part; the others stay as
            the module has them.

    Attributes:
        params: the parameters that train, by name, detached and shared with the module.

    Example:
        >>> head = Functional(nn.Linear(4, 2))
        >>> zeros = {name: torch.zeros_like(param) for name, param in head.params.items()}
        >>> head(zeros, torch.ones(1, 4))
        tensor([[0., 0.]])
    """

    def __init__(self, module: nn.Module, names: Collection[str] | None = None):
        self.module = module
        self.params: Params = {
            name: param.detach()
            for name, param in module.named_parameters()
            if param.requires_grad and (names is None or name in names)
        }

    def __call__(self, params: Params, *args, **kwargs):
        with self._preserve_rng():
            buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
            return torch.func.functional_call(self.module, {**params, **buffers}, args, kwargs)

    def each(self, params: Params, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Calls the module on each input, such as the views of a batch, and stacks the outputs.

        All calls share one random state: inputs draw different dropout masks, one after the other, as in a
        regular step. BatchNorm sees each input on its own.
        """
        with self._preserve_rng():
            outputs = []
            for x in inputs:
                buffers = {name: buffer.clone() for name, buffer in self.module.named_buffers()}
                outputs.append(torch.func.functional_call(self.module, {**params, **buffers}, (x,)))
            return torch.stack(outputs)

    @property
    def devices(self) -> set[torch.device]:
        """Where the module is, whichever of its parameters are exposed."""
        return {tensor.device for tensor in (*self.module.parameters(), *self.module.buffers())}

    def _preserve_rng(self) -> AbstractContextManager:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return nullcontext()  # a captured call draws nothing, see CudaGraph; do not ask the generator
        return torch.random.fork_rng(devices=[device for device in self.devices if device.type == "cuda"])


class EncoderPass(NamedTuple):
    """A forward pass through the encoder at theta, with its graph.

    Attributes:
        features: h, with a graph that ends in ``params``.
        params: theta, the leaves of that graph.
        tape: of the pass, to make its forward-mode pass cheaper; None if there is none.
        shared: whether others differentiate the same graph afterwards.
    """

    features: torch.Tensor
    params: Params
    tape: Tape | None = None
    shared: bool = False


@dataclass(frozen=True)
class BilevelProblem:
    """One batch's bi-level problem, as pure functions of its parameters.

    The outer parameters w enter behind the encoder. That is what makes the exact gradient cheap (see
    :class:`~metamask_plugin.bilevel.Exact`), and it holds for MetaMask, where w is the mask, and for ICL-MSR,
    where w is the semantic regulariser's output A.

    The functions must be pure: same arguments, same value, nothing changed outside.
    :class:`~metamask_plugin.bilevel.Functional` makes them so from modules, and :meth:`on_views` the whole
    problem from an encoder and a batch's views.

    Attributes:
        encode: theta -> h, the features of this rank's batch, any one shape.
        inner_loss: (h, phi, w) -> scalar, the loss that the inner step descends; h of the global batch.
        outer_loss: (h, phi, w) -> scalar, the loss at the adapted parameters, minimised over w; h likewise.
            The same object as ``inner_loss`` where both are the same function.
        encoder_params: theta.
        head_params: phi, everything behind the encoder that takes the inner step.
        outer_params: w.
        encode_once: ``encode`` up to rounding, for passes that are differentiated once and in reverse mode:
            it may be compiled, or compute in a lower precision. ``encode`` if None.
        eager: within it ``encode_once`` is not compiled, so that a :class:`Tape` can record it.
        encoded: the pass at theta, where one has been made already, as by the regular step.
        outer_encode: ``encode_once`` of the batch that the outer loss is of, where that is another one.
        ranks: who shares the batch; None for a process on its own.
    """

    encode: Callable[[Params], torch.Tensor]
    inner_loss: Callable[[torch.Tensor, Params, OuterParams], torch.Tensor]
    outer_loss: Callable[[torch.Tensor, Params, OuterParams], torch.Tensor]
    encoder_params: Params
    head_params: Params
    outer_params: OuterParams
    encode_once: Callable[[Params], torch.Tensor] | None = None
    eager: Callable[[], AbstractContextManager] = nullcontext
    encoded: EncoderPass | None = None
    outer_encode: Callable[[Params], torch.Tensor] | None = None
    ranks: Ranks | None = None

    def __post_init__(self) -> None:
        # a tensor would be taken for the tuple of its rows, and its gradient be one number a row
        if not isinstance(self.outer_params, tuple) or not all(torch.is_tensor(w) for w in self.outer_params):
            kind = type(self.outer_params).__name__
            raise ValueError(
                "BilevelProblem: outer_params must be a tuple of tensors, "
                f"got a {kind}; write outer_params=(mask,)"
            )

    @property
    def first_order_encode(self) -> Callable[[Params], torch.Tensor]:
        """``encode_once`` where there is one."""
        return self.encode_once or self.encode

    @classmethod
    def on_views(
        cls,
        encoder: Functional,
        views: Sequence[torch.Tensor],
        outer_views: Sequence[torch.Tensor] | None = None,
        dtype: torch.dtype | None = None,
        **more: Any,
    ) -> "BilevelProblem":
        """A problem whose features are those of a batch's views, stacked: h has the shape (M, N, D).

        Args:
            encoder: the encoder as a function. Its module's ``forward`` may be compiled, and then has a
                context ``paused`` in which it is not.
            views: images of each view, (N, 3, H, W) each; BatchNorm sees them one by one.
            outer_views: those of the outer loss, where it is of another batch.
            dtype: that autocast lowers reverse-mode passes to; None for none.
            more: the other attributes.
        """
        eager = getattr(encoder.module.forward, "paused", nullcontext)

        def encode(theta: Params) -> torch.Tensor:
            with eager():
                return encoder.each(theta, views)

        def encode_once(theta: Params, images: Sequence[torch.Tensor] = views) -> torch.Tensor:
            if dtype is None:
                return encoder.each(theta, images)
            # without its cache, which would hand a later pass the casts, and the graph, of an earlier one
            with torch.autocast(images[0].device.type, dtype, cache_enabled=False):
                return encoder.each(theta, images)

        return cls(
            encode=encode,
            encode_once=encode_once,
            outer_encode=None if outer_views is None else partial(encode_once, images=outer_views),
            encoder_params=encoder.params,
            eager=eager,
            **more,
        )

    def global_features(self, own: torch.Tensor) -> torch.Tensor:
        """h of the global batch, or its tangent, from this rank's: without a graph, in the precision of w."""
        h = own.detach() if self.ranks is None else self.ranks.gather(own)
        return h.to(self.outer_params[0].dtype)

    def loss_inputs(self, own: torch.Tensor, phi: Params) -> tuple[torch.Tensor, Params, OuterParams]:
        """What both losses are functions of, (h, phi, w), as leaves of a graph.

        Args:
            own: features of this rank's batch.
            phi: the head's parameters, or adapted ones.
        """
        h = self.global_features(own).requires_grad_()
        w = tuple(w.detach().requires_grad_() for w in self.outer_params)
        return h, leaves(phi), w

    @torch.no_grad()
    def frozen_encoder(self) -> "BilevelProblem":
        """The same problem with an inner step on the heads alone: theta' = theta.

        Its features are those of one forward pass, or of none where ``encoded`` is given.
        """
        if self.encoded is not None:
            features = self.encoded.features.detach()
        else:
            features = self.first_order_encode(self.encoder_params)
        outer = None if self.outer_encode is None else self.outer_encode(self.encoder_params)
        return replace(
            self,
            encode=lambda _: features,
            encode_once=None,
            encoder_params={},
            encoded=EncoderPass(features, {}),
            outer_encode=None if outer is None else lambda _: outer,
        )
