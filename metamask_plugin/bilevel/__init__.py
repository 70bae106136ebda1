"""Bi-level optimisation with one inner step, in pure PyTorch.

    minimise over w   L_out(theta', phi', w)
    where             theta' = theta - l * grad_theta L_in(theta, phi, w),   phi' alike

:class:`BilevelProblem` says what the two losses are, :class:`InnerStep` how the adapted parameters theta',
phi' are made, and an :class:`Estimator` how the gradient with respect to the outer parameters w is computed.
Imports torch and nothing else; knows neither Lightning nor self-supervised learning.
"""

from metamask_plugin.bilevel.cuda_graph import CaptureError, CudaGraph
from metamask_plugin.bilevel.estimators import (
    ESTIMATORS,
    Estimator,
    Exact,
    FiniteDifference,
    FirstOrder,
    HeadsOnly,
    MetaGradient,
    Permuted,
    Unrolled,
)
from metamask_plugin.bilevel.inner_step import (
    AdamStep,
    InnerStep,
    MatchedStep,
    MomentumStep,
    PlainStep,
    StepRule,
    TrustRatioStep,
    rule_following,
)
from metamask_plugin.bilevel.problem import BilevelProblem, EncoderPass, Functional
from metamask_plugin.bilevel.ranks import Ranks, current_ranks, global_batch
from metamask_plugin.bilevel.tape import Tape

__all__ = [
    "ESTIMATORS",
    "AdamStep",
    "BilevelProblem",
    "CaptureError",
    "CudaGraph",
    "EncoderPass",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "FirstOrder",
    "Functional",
    "HeadsOnly",
    "InnerStep",
    "MatchedStep",
    "MetaGradient",
    "MomentumStep",
    "Permuted",
    "PlainStep",
    "Ranks",
    "StepRule",
    "Tape",
    "TrustRatioStep",
    "Unrolled",
    "current_ranks",
    "global_batch",
    "rule_following",
]
