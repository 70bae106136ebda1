"""The meta-gradient as a strategy, and the first-order pieces that the strategies share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch.nn.utils import get_total_norm

from metamask_plugin.bilevel.params import Params, Weights, leaves
from metamask_plugin.bilevel.problem import BilevelProblem, EncoderPass
from metamask_plugin.bilevel.trial import LinearTrial, Trial


class MetaGradient(NamedTuple):
    """A meta-gradient and what was met on the way; all but the first are detached scalars.

    Attributes:
        weights: dL_out/dw, shaped as the problem's ``weights``.
        inner_loss: L_in at the weights.
        outer_loss: L_out at the trial weights.
        gain: L_out at the weights less L_out at the trial weights. A trial step that is right for its
            purpose has one above 0; where both losses are the same it is L_in - L_out.
        relative_length: of the trial step, |(theta', phi') - (theta, phi)| / |(theta, phi)|.
    """

    weights: Weights
    inner_loss: torch.Tensor
    outer_loss: torch.Tensor
    gain: torch.Tensor
    relative_length: torch.Tensor


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
        outer_loss: L_out at the weights.
        trial: the trial steps, linear at this gradient.
    """

    loss: torch.Tensor
    weights: Weights
    features_gradient: torch.Tensor
    head_gradient: Params
    encoder_trial: Params
    head_trial: Params
    encoder_pass: EncoderPass
    outer_loss: torch.Tensor
    trial: LinearTrial


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
    params = problem.encoder_params, problem.head_params
    linear = trial.at(params, (grad_theta, detached))
    return InnerStep(
        loss.detach(),
        weights,
        grad_h,
        grad_phi,
        linear.encoder.step(params[0], grad_theta),
        linear.head.step(params[1], detached),
        encoder_pass,
        outer_loss_before(problem, h, loss),
        linear,
    )


@torch.no_grad()
def outer_loss_before(problem: BilevelProblem, h: torch.Tensor, inner_loss: torch.Tensor) -> torch.Tensor:
    """L_out at the weights: what the trial step starts from.

    Args:
        problem: the problem.
        h: features of the joint batch at theta.
        inner_loss: L_in at the weights.
    """
    if problem.outer_encode is not None:
        h = joint_features(problem, problem.outer_encode(problem.encoder_params))
    elif problem.outer_loss is problem.inner_loss:
        return inner_loss.detach()
    return problem.outer_loss(h, problem.head_params, problem.weights)


def relative_length(problem: BilevelProblem, encoder_trial: Params, head_trial: Params) -> torch.Tensor:
    """Of the trial step, in the length of the weights; 0 where there are none."""
    weights = [*problem.encoder_params.values(), *problem.head_params.values()]
    trial = [*encoder_trial.values(), *head_trial.values()]
    moved = get_total_norm([after - before for before, after in zip(weights, trial, strict=True)])
    size = get_total_norm(weights)
    return moved / size.clamp(min=torch.finfo(size.dtype).tiny)


class OuterGradients(NamedTuple):
    """L_out at the trial weights, its direct gradient, and the direction that the trial step takes."""

    loss: torch.Tensor
    direct: Weights
    encoder_direction: Params
    head_direction: Params

    def result(self, problem: BilevelProblem, inner: InnerStep, weights: Weights) -> MetaGradient:
        """The meta-gradient ``weights`` with what was met on the way."""
        length = relative_length(problem, inner.encoder_trial, inner.head_trial)
        return MetaGradient(weights, inner.loss, self.loss, inner.outer_loss - self.loss, length)


def outer_gradients(problem: BilevelProblem, inner: InnerStep) -> OuterGradients:
    """Back-propagates L_out at (theta', phi'): d_w L_out, and u = l * v for both groups."""
    encoder_pass = problem.outer_pass(inner.encoder_trial)
    h, phi = joint_features(problem, encoder_pass.features).requires_grad_(), leaves(inner.head_trial)
    weights = tuple(w.detach().requires_grad_() for w in problem.weights)
    outer = problem.outer_loss(h, phi, weights)
    (v_h,), v_phi, direct = gradients(outer, (h,), phi, weights)
    v_theta = encoder_gradient(problem, encoder_pass, v_h)
    directions = inner.trial.encoder.pull_back(v_theta), inner.trial.head.pull_back(v_phi)
    return OuterGradients(outer.detach(), direct, *directions)


def joint_features(problem: BilevelProblem, own: torch.Tensor) -> torch.Tensor:
    """h of the joint batch, or its tangent, from this process's: without a graph, in the precision of w."""
    return problem.processes.gather(own.detach()).to(problem.weights[0].dtype)


def encoder_gradient(problem: BilevelProblem, encoder_pass: EncoderPass, grad_h: torch.Tensor) -> Params:
    """From a gradient with respect to the joint h to that with respect to theta, of the joint batch."""
    return problem.processes.sum(encoder_pass.pull_back(problem.processes.part(grad_h.detach())))
