"""A control: a meta-gradient that belongs to other entries of the weights."""

import random

import torch

from metamask_plugin.bilevel.estimator import Estimator, MetaGradient
from metamask_plugin.bilevel.exact import Exact
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.trial import Trial


class Permuted(Estimator):
    """The exact meta-gradient with its entries permuted along the last axis, always in the same way.

    Weights that follow it take steps as long, as persistent and as spread as they would otherwise, in a
    direction that has nothing to do with their dimensions. What they gain over weights that stay as they are
    is not owed to the meta-gradient.

    Args:
        seed: of the permutation.
    """

    def __init__(self, seed: int = 0):
        if not isinstance(seed, int):
            raise ValueError(f"Permuted: seed must be a whole number, got {seed!r}")
        self.seed, self.exact = seed, Exact()
        self._orders: dict[int, torch.Tensor] = {}

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        result = self.exact.gradient(problem, trial)
        return result._replace(weights=tuple(self._permuted(gradient) for gradient in result.weights))

    def _permuted(self, gradient: torch.Tensor) -> torch.Tensor:
        size = gradient.shape[-1]
        if size not in self._orders:  # made once: a CUDA graph can hold no copy from the host
            order = random.Random(self.seed).sample(range(size), size)
            self._orders[size] = torch.tensor(order, device=gradient.device)
        return gradient[..., self._orders[size]]
