"""The meta-gradient as a strategy, and the first-order pieces that the strategies share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch

from metamask_plugin.bilevel.params import Params, Weights, leaves
from metamask_plugin.bilevel.problem import BilevelProblem, EncoderPass
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


def gradients(loss: torch.Tensor, *groups: Params | Weights, create_graph: bool = False) -> list:
    """Gradients of ``loss`` with respect to each group, in the group's own shape (zeros if unused)."""
    tensors = [t for group in groups for t in (group.values() if isinstance(group, dict) else group)]
    flat = iter(torch.autograd.grad(loss, tensors, create_graph=create_graph, materialize_grads=True))
    return [
        {name: next(flat) for name in group} if isinstance(group, dict) else tuple(next(flat) for _ in group)
        for group in groups
    ]


class InnerStep(NamedTuple):
    """L_in at the weights, its gradients behind the encoder, and the trial weights they lead to.

    Attributes:
        loss: L_in.
        weights: w, as leaves.
        features_gradient: grad_h L_in of the joint batch.
        head_gradient: grad_phi L_in.
        encoder_trial: theta', in no graph.
        head_trial: phi', in no graph.
        encoder_pass: the forward pass at theta.
    """

    loss: torch.Tensor
    weights: Weights
    features_gradient: torch.Tensor
    head_gradient: Params
    encoder_trial: Params
    head_trial: Params
    encoder_pass: EncoderPass


def inner_step(problem: BilevelProblem, trial: Trial, twice: bool = False, tape: bool = False) -> InnerStep:
    """Makes the trial step.

    Args:
        problem: the problem.
        trial: the trial steps.
        twice: keep the graph of the gradients behind the encoder, so that they can be differentiated once
            more.
        tape: record the pass through the encoder.
    """
    encoder_pass = problem.encoded or problem.forward_pass(problem.encoder_params, tape)
    h = joint_features(problem, encoder_pass.features).requires_grad_()
    phi = leaves(problem.head_params)
    weights = tuple(w.detach().requires_grad_() for w in problem.weights)
    loss = problem.inner_loss(h, phi, weights)
    (grad_h,), grad_phi = gradients(loss, (h,), phi, create_graph=twice)
    grad_theta = encoder_gradient(problem, encoder_pass, grad_h)
    detached = {name: grad.detach() for name, grad in grad_phi.items()}
    return InnerStep(
        loss.detach(),
        weights,
        grad_h,
        grad_phi,
        trial.encoder.step(problem.encoder_params, grad_theta),
        trial.head.step(problem.head_params, detached),
        encoder_pass,
    )


class OuterGradients(NamedTuple):
    """L_out at the trial weights, its direct gradient, and the direction that the trial step takes."""

    loss: torch.Tensor
    direct: Weights
    encoder_direction: Params
    head_direction: Params


def outer_gradients(problem: BilevelProblem, trial: Trial, inner: InnerStep) -> OuterGradients:
    """Back-propagates L_out at (theta', phi'): d_w L_out, and u = l * v for both groups."""
    encoder_pass = problem.forward_pass(inner.encoder_trial)
    h, phi = joint_features(problem, encoder_pass.features).requires_grad_(), leaves(inner.head_trial)
    weights = tuple(w.detach().requires_grad_() for w in problem.weights)
    outer = problem.outer_loss(h, phi, weights)
    (v_h,), v_phi, direct = gradients(outer, (h,), phi, weights)
    v_theta = encoder_gradient(problem, encoder_pass, v_h)
    return OuterGradients(
        outer.detach(), direct, trial.encoder.pull_back(v_theta), trial.head.pull_back(v_phi)
    )


def joint_features(problem: BilevelProblem, own: torch.Tensor) -> torch.Tensor:
    """h of the joint batch, or its tangent, from this process's: without a graph, in the precision of w."""
    return problem.processes.gather(own.detach()).to(problem.weights[0].dtype)


def encoder_gradient(problem: BilevelProblem, encoder_pass: EncoderPass, grad_h: torch.Tensor) -> Params:
    """From a gradient with respect to the joint h to that with respect to theta, of the joint batch."""
    return problem.processes.sum(encoder_pass.pull_back(problem.processes.part(grad_h.detach())))
