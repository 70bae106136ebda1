"""The meta-gradient by back-propagation through the trial step: the oracle."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_plugin.bilevel.estimator import (
    Estimator,
    MetaGradient,
    gradients,
    outer_loss_before,
    relative_length,
)
from metamask_plugin.bilevel.params import leaves
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.processes import OneProcess
from metamask_plugin.bilevel.trial import Trial


class Unrolled(Estimator):
    """Keeps the graph of the trial step and back-propagates through all of it.

    Exact by construction, and the reference against which the others are tested. It is the slowest
    and holds two graphs through the encoder at once. One process alone: what processes exchange is not
    differentiated.
    """

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        if not isinstance(problem.processes, OneProcess):
            raise ValueError("Unrolled: works in one process alone; take Exact, which equals it")
        theta, phi = leaves(problem.encoder_params), leaves(problem.head_params)
        weights = tuple(w.detach().requires_grad_() for w in problem.weights)
        with sdpa_kernel(SDPBackend.MATH):  # fused attention has no double backward
            h = problem.encode(theta)
            inner = problem.inner_loss(h, phi, weights)
            grads = gradients(inner, theta, phi, create_graph=True)
            theta_grad, phi_grad = ({name: grad.detach() for name, grad in group.items()} for group in grads)
            linear = trial.at((problem.encoder_params, problem.head_params), (theta_grad, phi_grad))
            theta_trial = linear.encoder.step(theta, grads[0])
            phi_trial = linear.head.step(phi, grads[1])
            encode = problem.outer_encode or problem.encode
            outer = problem.outer_loss(encode(theta_trial), phi_trial, weights)
            (total,) = gradients(outer, weights)
        before = outer_loss_before(problem, h.detach(), inner)
        with torch.no_grad():
            length = relative_length(problem, theta_trial, phi_trial)
        return MetaGradient(total, inner.detach(), outer.detach(), before - outer.detach(), length)
