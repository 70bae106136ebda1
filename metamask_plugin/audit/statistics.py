"""What can be said about differences between classifiers that saw the same test images.

All differences are of correctness, 1 or 0 an image, so a difference is 1 where only the first is right, -1
where only the second is, else 0. Intervals are over images drawn anew from where the test images come from;
the training images and the encoder stay.

Images that show the same original are not independent. The original is then the unit: correctness is that of
:func:`per_original`, float in [0, 1], and N counts originals.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from scipy.stats import false_discovery_control

from metamask_plugin.errors import check


class Estimate(NamedTuple):
    """An estimate with its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:+.2f} [{self.low:+.2f}, {self.high:+.2f}]"


class Estimates(NamedTuple):
    """One estimate for each of D dimensions, float64 arrays of shape (D,).

    Attributes:
        value: the estimates.
        low: lower ends of the intervals.
        high: upper ends.
        p: two-sided p-values of "it is 0".
        q: the same after Benjamini and Hochberg: those below a level are a list with at most that share of
            false discoveries, on average.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    q: np.ndarray


def repeated(originals: torch.Tensor | None) -> torch.Tensor | None:
    """The originals of images (N,), or None where no two images share one."""
    return None if originals is None or len(originals.unique()) == len(originals) else originals


def per_original(correct: torch.Tensor, originals: torch.Tensor | None) -> torch.Tensor:
    """The share of the images of each original that are right; as given without originals.

    Args:
        correct: (..., N).
        originals: of each image, (N,), as many images of each; or None.

    Returns:
        float64 (..., G), in the order of the originals' numbers.
    """
    if originals is None:
        return correct
    _, originals, count = originals.unique(return_inverse=True, return_counts=True)
    sums = torch.zeros(*correct.shape[:-1], len(count), dtype=torch.float64)
    return sums.index_add_(-1, originals, correct.double()) / count


def standard_error(correct: torch.Tensor, originals: torch.Tensor | None = None) -> float:
    """Standard error of an accuracy over test images drawn anew, percentage points; NaN for fewer than two.

    Args:
        correct: (N,).
        originals: see :func:`per_original`; then over originals.
    """
    units = per_original(correct, originals).double()
    if len(units) < 2:
        return math.nan
    return 100 * float(units.std()) / len(units) ** 0.5


def stratified_halves(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Splits images at random into two halves with the same share of every class.

    Args:
        labels: shape (N,).
        generator: of the draw.

    Returns:
        bool (N,), True for the first half, which is at most one image larger or smaller.

    Raises:
        UserError: for fewer than two images.
    """
    check(len(labels) >= 2, "test images", "two or more, to be split into halves", len(labels))
    shuffled = torch.randperm(len(labels), generator=generator)
    # classes one after the other, each in random order, and every other image of that line
    line = shuffled[labels[shuffled].argsort(stable=True)]
    first = torch.zeros(len(labels), dtype=torch.bool)
    first[line[int(torch.randint(2, (), generator=generator)) :: 2]] = True
    return first


def paired_differences(with_: torch.Tensor, without: torch.Tensor, level: float = 0.05) -> Estimates:
    """Accuracy of one classifier minus that of each of D others, in percentage points.

    The interval is Wald's after adding a half to each cell of the 2 x 2 table, which keeps its coverage where
    hardly any image differs [0]. The p-value is McNemar's exact one. For originals, both are Student's.

    Args:
        with_: correctness of the one, bool or float (N,).
        without: correctness of the others, (D, N).
        level: 1 minus the coverage.

    [0] Bonett and Price, *Adjusted Wald confidence interval for a difference of binomial proportions based on
        paired data*, Journal of Educational and Behavioral Statistics 37, 2012.
    """
    if with_.is_floating_point():
        differences = 100 * (with_ - without).numpy()
        student = scipy.stats.t(differences.shape[1] - 1)
        return _estimates(differences.mean(axis=1), scipy.stats.sem(differences, axis=1), student, level)
    only_with = (with_ & ~without).sum(dim=1).double().numpy()
    only_without = (~with_ & without).sum(dim=1).double().numpy()
    count = len(with_)
    a, b = (only_with + 1) / (count + 2), (only_without + 1) / (count + 2)
    reach = scipy.stats.norm.isf(level / 2) * np.sqrt((a + b - (a - b) ** 2) / (count + 2))
    fewer = np.minimum(only_with, only_without)
    p = np.minimum(1, 2 * scipy.stats.binom.cdf(fewer, only_with + only_without, 0.5))
    centre = 100 * (a - b)
    value = 100 * (only_with - only_without) / count
    return Estimates(value, centre - 100 * reach, centre + 100 * reach, p, false_discovery_control(p))


def banzhaf_values(masks: torch.Tensor, correct: torch.Tensor, level: float = 0.05) -> Estimates:
    """Each dimension's mean effect on accuracy over random sets of the others, in percentage points.

    The coefficients of the linear regression of correctness on which dimensions are kept. For masks that keep
    every dimension with probability one half, independently, they are the Banzhaf values of the game whose
    players are dimensions [0].

    The variance is that of the mean over images, plus that of the regression over masks: both were drawn, and
    the sum is at least as large as the variance of the crossed design [1].

    Args:
        masks: bool (R, D), R > D + 1.
        correct: bool or float (R, N).
        level: 1 minus the coverage.

    Raises:
        UserError: for too few masks.

    [0] Wang and Jia, *Data Banzhaf*, AISTATS 2023. [1] Owen, *The pigeonhole bootstrap*, Annals of Applied
        Statistics 1, 2007.
    """
    count, dim = masks.shape
    check(count > dim + 1, "masks of the regression", f"more than the {dim} dimensions and 1", count)
    design = masks.double()
    design = design - design.mean(dim=0)
    varies = design.abs().amax(dim=0) > 0
    # a dimension that no mask dropped has no visible effect, and would make the system singular
    precision = torch.linalg.pinv(design.T @ design, hermitian=True)
    influence = precision @ design.T
    per_image = influence @ correct.double()  # (D, N)
    value = per_image.mean(dim=1)
    mean_correct = correct.double().mean(dim=1)
    residual = mean_correct - mean_correct.mean() - design @ value
    noise = residual.square().sum() / (count - int(varies.sum()) - 1)
    error = (per_image.var(dim=1) / correct.shape[1] + noise * precision.diagonal()).sqrt()
    return _estimates(100 * value.numpy(), 100 * error.numpy(), scipy.stats.norm, level)


def _estimates(value: np.ndarray, error: np.ndarray, distribution: Any, level: float) -> Estimates:
    """Symmetric intervals; where the standard error is 0 the interval is a point and p of a 0 is 1."""
    reach = distribution.isf(level / 2) * error
    p = 2 * distribution.sf(np.abs(value) / np.maximum(error, 1e-300))
    return Estimates(value, value - reach, value + reach, p, false_discovery_control(p))


def bootstrap_gain(
    before: torch.Tensor, after: torch.Tensor, seed: int, draws: int = 10_000, level: float = 0.05
) -> Estimate:
    """Gain in accuracy by a paired bootstrap over images, percentile interval, in percentage points.

    Args:
        before: correctness, bool or float (N,).
        after: correctness of the same images, (N,).
        seed: of the bootstrap.
        draws: bootstrap samples.
        level: 1 minus the coverage.
    """
    difference = (after.double() - before.double()).numpy()
    count = len(difference)
    # a sample of images is a sample of their differences, of which there are three kinds; of originals more
    kinds = np.unique(difference) if before.is_floating_point() else np.array([1, -1, 0])
    cells = np.array([int((difference == kind).sum()) for kind in kinds]) / count
    drawn = np.random.default_rng(seed).multinomial(count, cells, size=draws)
    gains = 100 * (drawn @ kinds) / count
    low, high = np.quantile(gains, [level / 2, 1 - level / 2])
    return Estimate(100 * float(cells @ kinds), float(low), float(high))


def reality_check(before: torch.Tensor, after: torch.Tensor, seed: int, draws: int = 1000) -> float:
    """p-value of "none of these masks is better than no mask", for the best of them on the same images.

    White's reality check: how often the best of the masks gains as much when images are drawn anew and no
    mask is better on average. It accounts for the search, which the best mask's own p-value does not.

    Args:
        before: correctness without a mask, bool or float (N,).
        after: correctness under each mask, (R, N).
        seed: of the bootstrap.
        draws: bootstrap samples.

    [0] White, *A reality check for data snooping*, Econometrica 68, 2000.
    """
    difference = after.float() - before.float()
    gains = difference.mean(dim=1)
    count = len(before)
    weights = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    best = (torch.from_numpy(weights).float() @ difference.T / count - gains).amax(dim=1)
    exceeding = int((best >= gains.max() - 1e-6).sum())
    return (1 + exceeding) / (1 + draws)


def rank_correlation(x: np.ndarray, y: np.ndarray, level: float = 0.05) -> Estimate:
    """Spearman's correlation with the interval of Bonett and Wright (Psychometrika 65, 2000).

    NaN where one of the two does not vary, or there are fewer than four pairs.
    """
    if len(x) < 4 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return Estimate(*[float("nan")] * 3)
    value = float(scipy.stats.spearmanr(x, y).statistic)
    error = np.sqrt((1 + value**2 / 2) / (len(x) - 3))
    reach = scipy.stats.norm.isf(level / 2) * error
    centre = np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12))
    return Estimate(value, float(np.tanh(centre - reach)), float(np.tanh(centre + reach)))
