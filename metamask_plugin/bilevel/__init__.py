"""Bi-level optimisation with one trial step, in pure PyTorch.

    minimise over w   L_out(theta', phi', w)
    where             theta' = theta - l * grad_theta L_in(theta, phi, w),   phi' alike

:class:`BilevelProblem` says what the two losses are, :class:`Trial` how the trial weights are made,
and an :class:`Estimator` how the gradient with respect to w is computed. Imports torch and nothing
else; knows neither Lightning nor self-supervised learning.
"""

from metamask_plugin.bilevel.cuda_graph import CaptureError, CudaGraph
from metamask_plugin.bilevel.estimator import Estimator, MetaGradient
from metamask_plugin.bilevel.exact import Exact
from metamask_plugin.bilevel.finite_difference import FiniteDifference
from metamask_plugin.bilevel.first_order import FirstOrder
from metamask_plugin.bilevel.functional import Functional
from metamask_plugin.bilevel.permuted import Permuted
from metamask_plugin.bilevel.problem import BilevelProblem, EncoderPass
from metamask_plugin.bilevel.processes import DistributedBatch, OneProcess, Processes, joined
from metamask_plugin.bilevel.tape import Tape
from metamask_plugin.bilevel.trial import (
    AdamStep,
    MatchedStep,
    MomentumStep,
    PlainStep,
    Trial,
    TrialStep,
    TrustRatioStep,
)
from metamask_plugin.bilevel.unrolled import Unrolled

ESTIMATORS: dict[str, type[Estimator]] = {
    "exact": Exact,
    "unrolled": Unrolled,
    "finite_difference": FiniteDifference,
    "first_order": FirstOrder,
    "permuted": Permuted,
}

__all__ = [
    "ESTIMATORS",
    "AdamStep",
    "BilevelProblem",
    "CaptureError",
    "CudaGraph",
    "DistributedBatch",
    "EncoderPass",
    "Estimator",
    "Exact",
    "FiniteDifference",
    "FirstOrder",
    "Functional",
    "MatchedStep",
    "MetaGradient",
    "MomentumStep",
    "OneProcess",
    "Permuted",
    "PlainStep",
    "Processes",
    "Tape",
    "Trial",
    "TrialStep",
    "TrustRatioStep",
    "Unrolled",
    "joined",
]
