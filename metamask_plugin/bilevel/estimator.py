"""The meta-gradient as a strategy, and the first-order pieces that the strategies share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from metamask_plugin.bilevel.problem import BilevelProblem, Params, Weights
from metamask_plugin.bilevel.trial import Trial


class MetaGradient(NamedTuple):
    """A meta-gradient and the losses met on the way.

    Attributes:
        weights: dL_out/dw, shaped as the problem's ``weights``.
        inner_loss: L_in at the weights, detached scalar.
        outer_loss: L_out at the trial weights, detached scalar.
    """

    weights: Weights
    inner_loss: torch.Tensor
    outer_loss: torch.Tensor


class Estimator(ABC):
    """How dL_out/dw is computed.

    With v the gradient of L_out at the trial weights and l the trial step's length,

        dL_out/dw = d_w L_out  -  d_w < grad L_in(theta, phi, w), l * v >

    The first term is direct; the second holds the second derivatives, and here estimators differ.
    """

    @abstractmethod
    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        """Computes the meta-gradient; parameters, their ``.grad``, buffers and RNG stay untouched."""


def leaves(params: Params) -> Params:
    """The same values as fresh leaves of the autograd graph; nothing flows back to the originals."""
    return {name: param.detach().requires_grad_() for name, param in params.items()}


def gradients(loss: torch.Tensor, *groups: Params | Weights, create_graph: bool = False) -> list:
    """Gradients of ``loss`` with respect to each group, in the group's own shape (zeros if unused)."""
    tensors = [t for group in groups for t in (group.values() if isinstance(group, dict) else group)]
    flat = iter(torch.autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True))
    return [
        {name: next(flat) for name in group} if isinstance(group, dict) else tuple(next(flat) for _ in group)
        for group in groups
    ]


def trial_weights(problem: BilevelProblem, trial: Trial) -> tuple[torch.Tensor, Params, Params]:
    """Makes the trial step to first order. Returns (L_in, theta', phi'), none of it in a graph."""
    theta, phi = leaves(problem.encoder_params), leaves(problem.head_params)
    inner = problem.inner_loss(problem.encode(theta), phi, problem.weights)
    grad_theta, grad_phi = gradients(inner, theta, phi)
    theta_trial = trial.encoder.step(problem.encoder_params, grad_theta)
    phi_trial = trial.head.step(problem.head_params, grad_phi)
    return inner.detach(), theta_trial, phi_trial


class OuterGradients(NamedTuple):
    """L_out at the trial weights, its direct gradient, and the direction that the trial step takes."""

    loss: torch.Tensor
    direct: Weights
    encoder_direction: Params
    head_direction: Params


def outer_gradients(
    problem: BilevelProblem, trial: Trial, theta_trial: Params, phi_trial: Params
) -> OuterGradients:
    """Back-propagates L_out at (theta', phi'): d_w L_out, and u = l * v for both groups."""
    theta, phi = leaves(theta_trial), leaves(phi_trial)
    weights = tuple(w.detach().requires_grad_() for w in problem.weights)
    outer = problem.outer_loss(problem.encode(theta), phi, weights)
    v_theta, v_phi, direct = gradients(outer, theta, phi, weights)
    return OuterGradients(
        outer.detach(), direct, trial.encoder.pull_back(v_theta), trial.head.pull_back(v_phi)
    )
