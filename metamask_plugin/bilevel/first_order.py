"""The meta-gradient without second derivatives."""

from metamask_plugin.bilevel.estimator import Estimator, MetaGradient, outer_gradients, trial_weights
from metamask_plugin.bilevel.problem import BilevelProblem
from metamask_plugin.bilevel.trial import Trial


class FirstOrder(Estimator):
    """The direct term alone, d_w L_out at the trial weights.

    Cheap and wrong: it ignores how w shaped the trial step. Kept as the ablation.
    """

    def gradient(self, problem: BilevelProblem, trial: Trial) -> MetaGradient:
        inner, theta_trial, phi_trial = trial_weights(problem, trial)
        outer = outer_gradients(problem, trial, theta_trial, phi_trial)
        return MetaGradient(outer.direct, inner, outer.loss)
