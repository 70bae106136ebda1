"""The meta-gradient by central differences, as MetaMask's release computes it."""

from typing import cast

import torch

from metamask_plugin.bilevel.estimator import (
    Estimator,
    MetaGradient,
    gradients,
    inner_step,
    joint_features,
    outer_gradients,
)
from metamask_plugin.bilevel.params import Params, Weights
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.trial import Trial


class FiniteDifference(Estimator):
    """Second derivatives from two more first-order gradients [0, 1].

        d_w < grad L_in, u >  =  (d_w L_in(theta + e u) - d_w L_in(theta - e u)) / 2e,    e = r / |u|

    Args:
        r: length of the displacement in weight space, > 0. The release uses 1e-2, which is far off
            for networks with BatchNorm: see ``benchmarks/step_cost.py`` for the error at each r.

    [0] Liu et al., *DARTS*, ICLR 2019, Eq. (8).
    [1] https://github.com/lionellee9089/MetaMask
    """

    def __init__(self, r: float = 1e-2):
        if not r > 0:
            raise ValueError(f"FiniteDifference: r must be > 0, got {r}")
        self.r = r

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        inner = inner_step(problem, trial)
        outer = outer_gradients(problem, inner)
        u_theta, u_phi = outer.encoder_direction, outer.head_direction

        squares = sum(u.pow(2).sum() for u in [*u_theta.values(), *u_phi.values()])
        norm = torch.sqrt(cast(torch.Tensor, squares))
        # of a trial step of length 0, or a flat outer loss, any e gives the correction 0
        e = torch.where(norm > 0, self.r / norm, 1.0)
        plus = self._weight_gradient(problem, u_theta, u_phi, e)
        minus = self._weight_gradient(problem, u_theta, u_phi, -e)
        total = tuple(d - (p - m) / (2 * e) for d, p, m in zip(outer.direct, plus, minus))
        return outer.result(problem, inner, total)

    @staticmethod
    def _weight_gradient(problem: BilevelProblem, u_theta: Params, u_phi: Params, e: torch.Tensor) -> Weights:
        """d_w L_in with both groups displaced by e * u."""
        theta = {name: param + e * u_theta[name] for name, param in problem.encoder_params.items()}
        phi = {name: param + e * u_phi[name] for name, param in problem.head_params.items()}
        weights = tuple(w.detach().requires_grad_() for w in problem.weights)
        with torch.no_grad():  # w enters behind the encoder: no graph is needed through it
            h = joint_features(problem, problem.first_order_encode(theta))
        return gradients(problem.inner_loss(h, phi, weights), weights)[0]
