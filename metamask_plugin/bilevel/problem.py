"""What a bi-level problem is: an encoder, two losses behind it, and the weights to be learned."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import torch

from metamask_plugin.bilevel.params import Params, Weights, leaves
from metamask_plugin.bilevel.processes import OneProcess, Processes
from metamask_plugin.bilevel.tape import Tape


@dataclass(frozen=True)
class EncoderPass:
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

    def pull_back(self, cotangent: torch.Tensor) -> Params:
        """Gradient of <cotangent, h> with respect to theta."""
        if not self.params:
            return {}
        grads = torch.autograd.grad(
            self.features,
            list(self.params.values()),
            cotangent.to(self.features.dtype),
            retain_graph=self.shared,
            materialize_grads=True,
        )
        return dict(zip(self.params, grads))


@dataclass(frozen=True)
class BilevelProblem:
    """One batch's bi-level problem, as pure functions of its parameters.

    The weights w enter behind the encoder. That is what makes the exact gradient cheap (see
    :class:`~metamask_plugin.bilevel.Exact`), and it holds for MetaMask, where w is the mask, and
    for ICL-MSR, where w is the semantic regulariser's output A.

    The functions must be pure: same arguments, same value, nothing changed outside.
    :class:`~metamask_plugin.bilevel.Functional` makes them so from modules.

    Attributes:
        encode: theta -> h, the features of this process's batch, any one shape.
        inner_loss: (h, phi, w) -> scalar, the loss that makes the trial step; h of the joint batch.
        outer_loss: (h, phi, w) -> scalar, the loss at the trial weights, minimised over w; h likewise. The
            same object as ``inner_loss`` where both are the same function.
        encoder_params: theta.
        head_params: phi, everything behind the encoder that takes the trial step.
        weights: w.
        encode_once: ``encode`` up to rounding, for passes that are differentiated once and in reverse mode:
            it may be compiled, or compute in a lower precision. ``encode`` if None.
        eager: within it ``encode_once`` is not compiled, so that a :class:`Tape` can watch it.
        encoded: the pass at theta, where one has been made already, as by the regular step.
        outer_encode: ``encode_once`` of the batch that the outer loss is of, where that is another one.
        processes: who shares the batch.
    """

    encode: Callable[[Params], torch.Tensor]
    inner_loss: Callable[[torch.Tensor, Params, Weights], torch.Tensor]
    outer_loss: Callable[[torch.Tensor, Params, Weights], torch.Tensor]
    encoder_params: Params
    head_params: Params
    weights: Weights
    encode_once: Callable[[Params], torch.Tensor] | None = None
    eager: Callable[[], AbstractContextManager] = nullcontext
    encoded: EncoderPass | None = None
    outer_encode: Callable[[Params], torch.Tensor] | None = None
    processes: Processes = field(default_factory=OneProcess)

    def __post_init__(self) -> None:
        # a tensor would be taken for the tuple of its rows, and its gradient be one number a row
        if not isinstance(self.weights, tuple) or not all(torch.is_tensor(w) for w in self.weights):
            kind = type(self.weights).__name__
            raise ValueError(
                f"BilevelProblem: weights must be a tuple of tensors, got a {kind}; write weights=(mask,)"
            )

    @property
    def first_order_encode(self) -> Callable[[Params], torch.Tensor]:
        """``encode_once`` where there is one."""
        return self.encode_once or self.encode

    def forward_pass(self, params: Params, tape: bool = False) -> EncoderPass:
        """The encoder at ``params``, to be differentiated once in reverse mode.

        Args:
            params: theta, or trial weights.
            tape: record the pass.
        """
        theta = leaves(params)
        if not tape:
            return EncoderPass(self.first_order_encode(theta), theta)
        recorder = Tape()
        with self.eager(), recorder.recording():
            return EncoderPass(self.first_order_encode(theta), theta, recorder)

    def outer_pass(self, params: Params) -> EncoderPass:
        """The encoder at ``params`` on the batch that the outer loss is of."""
        if self.outer_encode is None:
            return self.forward_pass(params)
        theta = leaves(params)
        return EncoderPass(self.outer_encode(theta), theta)

    @torch.no_grad()
    def frozen_encoder(self) -> "BilevelProblem":
        """The same problem with a trial step on the heads alone: theta' = theta.

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
