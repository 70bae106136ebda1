"""The dimensional mask M: one learned weight per feature dimension."""

import math
from collections.abc import Sequence

import torch
from torch import nn

from metamask_plugin.errors import check, choose

PARAMETERISATIONS = ("free", "sigmoid")

LARGEST_LOGIT = 16.0
"""Its sigmoid is 1 - 1.2e-7 in float32; that of 17 is 1, with a derivative of 0."""


class DimensionalMask(nn.Module):
    """Weighs the dimensions of a representation, h~ = h * M. Eq. (4) of [0].

    Its parameter does not require a gradient: the regular step holds M fixed (Algorithm 1 of [0]),
    and outside the main optimiser it is also outside DDP's reducer. The meta step differentiates
    with respect to :meth:`values` and hands the result to :meth:`accumulate`.

    Args:
        dim: D.
        parameterisation: ``free``: M itself, as in the paper, started at 1, this package's choice, as the
            paper gives no start; ``sigmoid``: M = sigmoid of a logit started at 0, so M = 1/2 (the
            release [1]).
        start: D weights to start from instead, such as those of a learned mask.

    [0] Li et al., *MetaMask*, NeurIPS 2022.
    [1] https://github.com/lionellee9089/MetaMask

    Example:
        >>> mask = DimensionalMask(3, start=[1.0, 0.5, 0.0])
        >>> mask(torch.full((1, 3), 2.0))
        tensor([[2., 1., 0.]])
        >>> mask.accumulate(torch.ones(3))
        >>> mask.weight.grad
        tensor([1., 1., 1.])
    """

    def __init__(self, dim: int, parameterisation: str = "free", start: Sequence[float] | None = None):
        super().__init__()
        choose("method_kwargs.mask.parameterisation", parameterisation, PARAMETERISATIONS)
        free = parameterisation == "free"
        name = "method_kwargs.mask.start"
        start = [1.0 if free else 0.5] * dim if start is None else start
        check(not isinstance(start, str), name, "a list of weights", start)
        start = [float(weight) for weight in start]
        check(len(start) == dim, name, f"of the encoder's {dim} dimensions", f"{len(start)} weights")
        check(all(map(math.isfinite, start)), name, "of finite weights", "NaN or infinity")
        weights = torch.tensor(start, dtype=torch.get_default_dtype())
        if free:
            self.weight = nn.Parameter(weights, requires_grad=False)
        else:
            inside = min(start) > 0 and max(start) < 1
            check(inside, name, "of weights between 0 and 1 with parameterisation=sigmoid", "others")
            self.logit = nn.Parameter(weights.logit(), requires_grad=False)
        self.parameterisation = parameterisation

    def values(self) -> torch.Tensor:
        """M, shape (D,), detached."""
        return self.weight.detach() if self.parameterisation == "free" else torch.sigmoid(self.logit.detach())

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        """Masks features of shape (..., D)."""
        return feats * self.values()

    def accumulate(self, gradient: torch.Tensor) -> None:
        """Sets the parameter's ``.grad`` from dL/dM, shape (D,), by the chain rule."""
        if self.parameterisation == "free":
            self.weight.grad = gradient
        else:
            m = self.values()
            self.logit.grad = gradient * m * (1 - m)

    @torch.no_grad()
    def confine(self) -> None:
        """Keeps a sigmoid's weights inside (0, 1), where rounding would make them 0 or 1 for good.

        A free mask may have any finite weight.
        """
        if self.parameterisation == "sigmoid":
            self.logit.clamp_(-LARGEST_LOGIT, LARGEST_LOGIT)

    @torch.no_grad()
    def statistics(self) -> dict[str, torch.Tensor]:
        """What the mask has become, as scalars to log.

        ``mask_mean``; ``mask_std`` (its spread); ``mask_min``; ``mask_max``; and
        ``mask_below_average``, the share of dimensions weighted below the mean, which A.4.7 of [0]
        takes as the candidates for confounders.
        """
        m = self.values()
        return {
            "mask_mean": m.mean(),
            "mask_std": m.std(unbiased=False),
            "mask_min": m.min(),
            "mask_max": m.max(),
            "mask_below_average": (m < m.mean()).float().mean(),
        }
