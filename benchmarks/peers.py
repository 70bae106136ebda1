"""What MetaMask is compared with, in the same process and run.

SimCLR alone, Barlow Twins alone, both without a mask (the unit of every ratio), and the meta step of the
authors' release [0], told again as an estimator. Peers for benchmarks, not for users.

[0] https://github.com/lionellee9089/MetaMask
"""

import copy
from typing import Any

import torch
from torch import nn

from metamask_plugin.bilevel import BilevelProblem, Estimator, Functional, InnerStep, MetaGradient
from metamask_plugin.bilevel.estimators import relative_length

UNIT = "SimCLR + Barlow"

PEERS: dict[str, dict[str, Any]] = {
    UNIT: {"method_kwargs__meta__enabled": False},
    "SimCLR": {"method": "baseline", "method_kwargs__task": "simclr"},
    "Barlow Twins": {"method": "baseline", "method_kwargs__task": "barlow_twins"},
}
"""Overrides of :func:`common.build_model` for methods without a mask; heads as MetaMask's."""

Tensors = dict[str, torch.Tensor]


class Release(Estimator):
    """The release's meta step, with what it does besides the arithmetic.

    The result is that of ``FiniteDifference(r)`` under the same trial; what differs is the way there:

    - every forward pass runs both heads, though the loss is the contrastive one alone;
    - a second copy of the network holds the trial weights; weights are written into it, back, and displaced
      in place;
    - the inner gradient and the momentum buffers are copied before they are used;
    - backward passes fill ``.grad`` of all parameters, and the two displaced forward passes keep a graph
      through the encoder, of which only the part behind it is used.

    In encoder forwards F: inner 3F, outer 3F, displaced 2F; and some ten passes over all weights.

    Args:
        redundancy_head: the other head; None for a model without one.
        r: length of the displacement in weight space; 1e-2 in the release.
    """

    def __init__(self, redundancy_head: nn.Module | None = None, r: float = 1e-2):
        self.idle = None if redundancy_head is None else Functional(redundancy_head)
        self.r = r
        self.second: tuple[Tensors, Tensors, Tensors] | None = None

    def gradient(self, problem: BilevelProblem, trial: InnerStep) -> MetaGradient:
        """Raises ValueError if the two trial steps' lengths differ: the release has one learning rate."""
        if trial.encoder.lr != trial.head.lr:
            raise ValueError(f"Release: one learning rate expected, got {trial.encoder.lr}, {trial.head.lr}")
        live = (problem.encoder_params, problem.head_params, {} if self.idle is None else self.idle.params)
        first = tuple(_leaves(group) for group in live)
        if self.second is None:
            self.second = tuple({name: param.clone() for name, param in group.items()} for group in live)
        second = tuple(_leaves(group) for group in self.second)  # the same memory, without .grad

        # inner: a full backward pass, then the virtual step, written into the second network
        mask = self._mask(problem)
        inner = self._loss(problem, problem.inner_loss, first, mask)
        inner.backward()
        grads = copy.deepcopy([[param.grad for param in group.values()] for group in first])
        stepped = []
        with torch.no_grad():
            for step, ours, theirs, found in zip(trial[:2], live, second, grads):
                present = {
                    name: torch.zeros_like(param) if grad is None else grad
                    for (name, param), grad in zip(ours.items(), found)
                }
                own = copy.copy(step)
                if getattr(step, "buffers", None):
                    own.buffers = copy.deepcopy(step.buffers)
                stepped.append(own.step(ours, present))
                for name, moved in stepped[-1].items():
                    theirs[name].copy_(moved)
            length = relative_length(problem, *stepped)

        # outer: a full backward pass on the second network
        mask = self._mask(problem)
        outer = self._loss(problem, problem.outer_loss, second, mask)
        outer.backward()
        total = [w.grad for w in mask]
        losses = inner.detach(), outer.detach(), (inner - outer).detach()
        vector = [[p.grad for p in group.values()] for group in second]

        # the second network gets the weights back, and is displaced along the outer gradient
        with torch.no_grad():
            for ours, theirs in zip(live, second):
                for name, param in ours.items():
                    theirs[name].copy_(param)
                    theirs[name].grad = None
        known = [grad for group in vector for grad in group if grad is not None]
        norm = torch.cat([grad.reshape(-1) for grad in known]).norm()
        if norm == 0:  # nowhere to go: the release would divide by zero
            return MetaGradient(tuple(total), *losses, length)
        e = self.r / norm
        plus = self._displaced(problem, second, vector, e)
        minus = self._displaced(problem, second, vector, -2 * e)
        for g, p, m in zip(total, plus, minus):
            g.sub_((p - m) / (2 * e) * trial.head.lr)
        return MetaGradient(tuple(total), *losses, length)

    @staticmethod
    def _mask(problem: BilevelProblem) -> tuple[torch.Tensor, ...]:
        return tuple(w.detach().clone().requires_grad_() for w in problem.outer_params)

    def _loss(self, problem: BilevelProblem, loss, network, mask) -> torch.Tensor:
        theta, phi, idle = network
        h = problem.encode(theta)
        if self.idle is not None:
            for view in h:
                self.idle(idle, view * mask[0])
        return loss(h, phi, mask)

    def _displaced(self, problem: BilevelProblem, network, vector, length: torch.Tensor):
        with torch.no_grad():
            for group, directions in zip(network, vector):
                for param, direction in zip(group.values(), directions):
                    if direction is not None:
                        param.add_(direction * length)
        mask = self._mask(problem)
        return torch.autograd.grad(self._loss(problem, problem.inner_loss, network, mask), mask)


def _leaves(params: Tensors) -> Tensors:
    return {name: param.detach().requires_grad_() for name, param in params.items()}
