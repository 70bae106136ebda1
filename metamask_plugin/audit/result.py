"""What the confounder audit found: numbers, a summary in words, and a figure."""

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metamask_plugin.audit.statistics import Estimate, Estimates

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# more dimensions than that are counted, not named, in a sentence
MAX_NAMED = 12


@dataclass(frozen=True)
class Effects:
    """Accuracy with each dimension minus without it, percentage points: below 0 it hurts.

    Attributes:
        all: on all test images, with intervals and false-discovery rates.
        selection: values on the selection half, shape (D,).
        held_out: values on the held-out half, shape (D,).
    """

    all: Estimates
    selection: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True)
class RandomMasks:
    """What random masks of one rate reach; accuracies in percent, gains in percentage points.

    Attributes:
        rate: share of the dimensions that each mask drops.
        dropped: their number.
        accuracy: of every mask, by split, each of shape (R,).
        above: share of the masks above the unmasked accuracy, by split.
        best: the mask that is best on the selection half.
        selection_gain: its gain there.
        held_out_gain: its gain on the held-out half, with a bootstrap interval.
        optimism: mean over random splits of the first gain minus the second: what selection alone gains.
        mean_selection_gain: mean over random splits of the best mask's gain on its selection half.
        mean_held_out_gain: mean over random splits of that mask's gain on the other half.
        correlation: Spearman's, of the masks' gains on the two halves, with an interval over masks.
        reality_check: p-value of "no mask is better than none", on all images.
    """

    rate: float
    dropped: int
    accuracy: dict[str, np.ndarray]
    above: dict[str, float]
    best: int
    selection_gain: float
    held_out_gain: Estimate
    optimism: float
    mean_selection_gain: float
    mean_held_out_gain: float
    correlation: Estimate
    reality_check: float

    def verdict(self) -> str:
        """In plain words."""
        above = {split: f"{100 * share:.0f} %" for split, share in self.above.items()}
        words = (
            f"Random masks of {100 * self.rate:g} % ({_count(self.dropped)}): {above['selection']} are above "
            f"the unmasked accuracy on one half of the images, {above['held-out']} on the other; the best on "
            f"the first half gains {self.selection_gain:+.2f} there and {self.held_out_gain} on the other, "
            f"{_outcome(self.held_out_gain)}. Choosing the best of {len(self.accuracy['all'])} by its own "
            f"images flatters it by {self.optimism:.2f} on average."
        )
        if math.isfinite(self.correlation.value):
            tells = "says little about" if self.correlation.low <= 0 else "goes with"
            words += f" A mask's gain on one half {tells} its gain on the other (rank correlation "
            words += f"{self.correlation})."
        return words


@dataclass(frozen=True)
class Removal:
    """The most harmful dimensions dropped one after the other, in an order found on the selection half.

    Attributes:
        method: how the order was found, ``banzhaf``, ``leave_one_out`` or ``greedy``.
        order: the dimensions, most harmful first.
        counts: numbers of dropped dimensions that were tried, from 0.
        selection: accuracy on the selection half for each of them, percent.
        held_out: accuracy on the held-out half, percent.
        chosen: the number that is best on the selection half, the smallest of equals.
        selection_gain: its gain there, percentage points.
        held_out_gain: its gain on the held-out half, with a bootstrap interval.
    """

    method: str
    order: list[int]
    counts: list[int]
    selection: list[float]
    held_out: list[float]
    chosen: int
    selection_gain: float
    held_out_gain: Estimate

    @property
    def dimensions(self) -> list[int]:
        """Those that are dropped at the chosen number."""
        return self.order[: self.chosen]

    def verdict(self) -> str:
        """In plain words."""
        if not self.chosen:
            return "Dropping the most harmful dimensions gains nothing even on the images they were found on."
        return (
            f"Dropping the {_count(self.chosen)} ranked most harmful on one half "
            f"({_named(self.dimensions)}) gains {self.selection_gain:+.2f} there and {self.held_out_gain} "
            f"on the other, {_outcome(self.held_out_gain)}."
        )


@dataclass(frozen=True)
class WeightAgreement:
    """Whether a learned mask's weights go with what the dimensions do.

    Attributes:
        leave_one_out: Spearman's correlation of weight and effect, over dimensions.
        banzhaf: the same with the other effect; a mask that weighs confounders down has it above 0.
        below: number of dimensions whose weight is below the mean.
        only_above: accuracy with the others alone, percent (A.4.7 of MetaMask, "unmasked" features).
        only_below: accuracy with these alone, percent ("masked" features).
    """

    leave_one_out: Estimate
    banzhaf: Estimate
    below: int
    only_above: float | None
    only_below: float | None

    def verdict(self) -> str:
        """In plain words."""
        if not math.isfinite(self.banzhaf.value):
            return "The learned weights or the effects are all equal, so they cannot agree."
        if self.banzhaf.low > 0:
            tells = "go with what a dimension is worth"
        elif self.banzhaf.high < 0:
            tells = "go against what a dimension is worth"
        else:
            tells = "say nothing about what a dimension is worth that could be told from chance"
        words = f"The learned weights {tells} (rank correlation {self.banzhaf})."
        if self.only_above is not None:
            words += (
                f" The dimensions above the mean weight reach {self.only_above:.2f} % alone, the "
                f"{self.below} below it {self.only_below:.2f} %."
            )
        return words


@dataclass(frozen=True)
class AuditResult:
    """What :func:`audit` found.

    Attributes:
        metric: the classifier, ``knn<k>`` or ``linear``.
        images: number of test images by split.
        dimensions: D.
        accuracy: unmasked, by split, percent.
        effects: ``leave_one_out`` and ``banzhaf``.
        harmful: dimensions whose Banzhaf value is below 0 at the false-discovery rate, most harmful first.
        helpful: number of dimensions whose value is above 0 at that rate.
        random: for each rate.
        removal: of the most harmful dimensions.
        weights: of a learned mask, where one was given.
        level: false-discovery rate, and 1 minus the coverage of the intervals.
        seed: of everything that is drawn.
    """

    metric: str
    images: dict[str, int]
    dimensions: int
    accuracy: dict[str, float]
    effects: dict[str, Effects]
    harmful: list[int]
    helpful: int
    random: list[RandomMasks]
    removal: Removal
    weights: WeightAgreement | None
    level: float
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Everything as dicts, lists, numbers and strings, ready for JSON; NaN becomes None."""
        return {**_plain(asdict(self)), "verdict": self.verdict()}

    def summary(self) -> str:
        """The findings as text, a line each."""
        return "\n".join(self.verdict())

    def plot(self, title: str | None = None) -> "Figure":
        """The findings in four panels, see :func:`metamask_plugin.audit.figures.audit_figure`.

        Args:
            title: above all panels, e.g. the encoder's name.
        """
        from metamask_plugin.audit.figures import audit_figure  # matplotlib is needed here alone

        return audit_figure(self, title)

    def verdict(self) -> list[str]:
        """The findings in plain words, a sentence or two each."""
        rate = f"(false-discovery rate {100 * self.level:g} %)"
        hurting = f"No dimension can be shown to hurt {rate}; {self.helpful} help."
        if self.harmful:
            hurt = f"{_count(len(self.harmful))} hurt{'s' if len(self.harmful) == 1 else ''}"
            hurting = f"{hurt} {rate}: {_named(self.harmful)}. {self.helpful} help."
        return [
            f"Unmasked {self.metric}: {self.accuracy['all']:.2f} % of {self.images['all']} test images, "
            f"{self.dimensions} dimensions.",
            hurting,
            *(masks.verdict() for masks in self.random),
            self.removal.verdict(),
            *([] if self.weights is None else [self.weights.verdict()]),
        ]


def _outcome(gain: Estimate) -> str:
    if gain.low > 0:
        return "which is a gain"
    return "which is a loss" if gain.high < 0 else "which cannot be told from 0"


def _count(number: int) -> str:
    return "1 dimension" if number == 1 else f"{number} dimensions"


def _named(dimensions: list[int]) -> str:
    named = ", ".join(str(d) for d in dimensions[:MAX_NAMED])
    rest = len(dimensions) - MAX_NAMED
    return f"{named} and {rest} more" if rest > 0 else named


def _plain(value: Any) -> Any:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, np.ndarray)):
        return [_plain(part) for part in (value.tolist() if isinstance(value, np.ndarray) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value
