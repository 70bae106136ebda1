"""The meta-gradient without second derivatives."""

from metamask_plugin.bilevel.estimator import Estimator, MetaGradient, inner_step, outer_gradients
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.trial import Trial


class FirstOrder(Estimator):
    """The direct term alone, d_w L_out at the trial weights.

    Cheap and wrong: it ignores how w shaped the trial step. Kept as the ablation.
    """

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        inner = inner_step(problem, trial)
        outer = outer_gradients(problem, inner)
        return outer.result(problem, inner, outer.direct)
