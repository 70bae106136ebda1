"""The exact meta-gradient, split at the encoder's output: forward mode over reverse mode."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_plugin.bilevel.estimator import (
    Estimator,
    MetaGradient,
    gradients,
    leaves,
    outer_gradients,
)
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.trial import Trial


class Exact(Estimator):
    """dL_out/dw to rounding error, without a second derivative through the encoder.

    The correction is d_w of

        s(w) = < grad_theta L_in, u_theta > + < grad_phi L_in, u_phi >,     u = l * v

    and w enters behind the encoder. With h = f_theta(x), the first product is a directional
    derivative of the encoder alone: < grad_theta L_in, u > = < grad_h L_in, J_theta f . u >. So one
    forward-mode pass gives the tangent of h, and what is left to differentiate twice is the heads.

    Cost, in encoder forwards F (a backward counts 2F): inner 3F, outer 3F, forward mode 3F.

    Reverse mode over *forward* mode would be as cheap, but is silently wrong through a train-mode
    BatchNorm in the heads (pytorch#196699). Reverse mode over reverse mode, used here at the heads,
    is not.
    """

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        theta, phi = leaves(problem.encoder_params), leaves(problem.head_params)
        weights = tuple(w.detach().requires_grad_() for w in problem.weights)

        # inner gradient: at the heads with a graph, since it is differentiated again below
        h = problem.encode(theta)
        h_cut = h.detach().requires_grad_()
        inner = problem.inner_loss(h_cut, phi, weights)
        (grad_h,), grad_phi = gradients(inner, (h_cut,), phi, create_graph=True)
        grad_theta = dict(
            zip(theta, torch.autograd.grad(h, list(theta.values()), grad_h, materialize_grads=True))
        )

        # outer gradient at the trial weights: the direct term, and u
        detached_phi = {name: grad.detach() for name, grad in grad_phi.items()}
        outer = outer_gradients(
            problem,
            trial,
            trial.encoder.step(problem.encoder_params, grad_theta),
            trial.head.step(problem.head_params, detached_phi),
        )

        # d_w s, with the encoder's part in forward mode; fused attention has no forward mode
        with sdpa_kernel(SDPBackend.MATH):
            _, h_tangent = torch.func.jvp(
                problem.encode, (problem.encoder_params,), (outer.encoder_direction,)
            )
        s = (grad_h * h_tangent).sum()
        for name, u in outer.head_direction.items():
            s = s + (grad_phi[name] * u).sum()
        (correction,) = gradients(s, weights)
        total = tuple(direct - c for direct, c in zip(outer.direct, correction))
        return MetaGradient(total, inner.detach(), outer.loss)
