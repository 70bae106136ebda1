"""The exact meta-gradient, split at the encoder's output: forward mode over reverse mode."""

from contextlib import nullcontext
from typing import cast

import torch
import torch.autograd.forward_ad as forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_plugin.bilevel.estimator import (
    Estimator,
    MetaGradient,
    gradients,
    inner_step,
    joint_features,
    outer_gradients,
)
from metamask_plugin.bilevel.params import Params
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.tape import Tape
from metamask_plugin.bilevel.trial import Trial


class Exact(Estimator):
    """dL_out/dw to rounding error, without a second derivative through the encoder.

    The correction is d_w of

        s(w) = < grad_theta L_in, u_theta > + < grad_phi L_in, u_phi >,     u = l * v

    and w enters behind the encoder. With h = f_theta(x), the first product is a directional
    derivative of the encoder alone: < grad_theta L_in, u > = < grad_h L_in, J_theta f . u >. So one
    forward-mode pass gives the tangent of h, and what is left to differentiate twice is the heads.

    Cost, in encoder forwards F (a backward counts 2F): inner 3F, outer 3F, forward mode 2F, since the inner
    pass has computed its primal part already (3F with ``reuse=False``). Where the regular step's pass serves
    as the inner one (``BilevelProblem.encoded``), the inner part is 2F.

    Reverse mode over *forward* mode would be as cheap, but is silently wrong through a train-mode
    BatchNorm in the heads (pytorch#196699). Reverse mode over reverse mode, used here at the heads,
    is not.

    Args:
        reuse: keep the outputs of the inner pass's convolutions and linear layers for the forward-mode
            pass: a quarter less arithmetic there, for memory that is held a little longer.
    """

    def __init__(self, reuse: bool = True):
        self.reuse = reuse

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        # inner gradient: at the heads with a graph, since it is differentiated again below
        inner = inner_step(problem, trial, twice=True, tape=self.reuse)

        # outer gradient at the trial weights: the direct term, and u
        outer = outer_gradients(problem, inner)

        # d_w s
        terms = [(inner.head_gradient[name] * u).sum() for name, u in outer.head_direction.items()]
        s = cast(torch.Tensor, sum(terms))
        if problem.encoder_params:
            tape = inner.encoder_pass.tape if self.reuse else None
            tangent = encoder_tangent(problem, outer.encoder_direction, tape)
            tangent = joint_features(problem, tangent)
            s = s + (inner.features_gradient * tangent).sum()
        (correction,) = gradients(s, inner.weights)
        total = tuple(direct - c for direct, c in zip(outer.direct, correction))
        return outer.result(problem, inner, total)


@torch.no_grad()
def encoder_tangent(problem: BilevelProblem, direction: Params, tape: Tape | None = None) -> torch.Tensor:
    """J_theta f . u, the tangent of this process's features, shaped as they are.

    Args:
        problem: the problem.
        direction: u, by name.
        tape: of a pass at the same theta.
    """
    replaying = nullcontext() if tape is None else tape.replaying()
    # fused attention has no forward mode
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), replaying:
        duals = {
            name: forward_ad.make_dual(param, direction[name])
            for name, param in problem.encoder_params.items()
        }
        features, tangent = forward_ad.unpack_dual(problem.encode(duals))
    return torch.zeros_like(features) if tangent is None else tangent
