"""What the metrics of a study's rows are called, how they are written, and whether more of one is better."""

import re
from typing import Any

NAMES = {
    "knn_release": "kNN of the release: k = 5, T = 1, masked, best epoch",
    "linear": "linear probe",
    "mlp": "MLP probe",
    "finetuned": "fine-tuned",
    "seconds": "training time (s)",
    "cpu_seconds": "processor time (s)",
    "seconds_per_epoch": "training time of an epoch (s)",
    "cpu_seconds_per_epoch": "processor time of an epoch (s)",
    "mean": "mean of the masks",
    "lowest": "lowest of the masks",
    "best": "best of the masks",
    "share_above": "masks above unmasked (%)",
}
SHORT = {"knn_release": "kNN of the release"}
"""In the heading of a column among others."""
SUFFIXES = {"": "", "_best": ", best epoch", "_top5": ", top 5", "_masked": ", masked"}
SUFFIXES |= {f"_{part}_average_only": f", dimensions {part} average alone" for part in ("above", "below")}
CHECKPOINTS = {"last": "last epoch", "best": "best epoch"}

_ACCURACY = re.compile(rf"(knn(\d+)|linear|mlp|finetuned)({'|'.join(SUFFIXES)})")
_OF_THE_RUN = re.compile(r"knn_release|epochs|(cpu_)?seconds(_per_epoch)?|parameters(_with_predictors|: .*)?")
_OVER_MASKS = ("masked", "unmasked", "mean", "lowest", "best")


def is_accuracy(metric: str) -> bool:
    """Whether a metric is in percent, and more of it better."""
    return metric in (*_OVER_MASKS, "knn_release") or _ACCURACY.fullmatch(metric) is not None


def is_of_the_run(metric: str) -> bool:
    """Whether a run has one value of the metric, whichever of its epochs is evaluated."""
    return _OF_THE_RUN.fullmatch(metric) is not None


def metric_name(metric: str) -> str:
    """As tables and axes have it: ``knn200`` becomes ``kNN, k = 200``; what is not known keeps its words."""
    found = _ACCURACY.fullmatch(metric)
    if not found:
        return NAMES.get(metric, metric.replace("_", " "))
    stem = f"kNN, k = {found[2]}" if found[2] else NAMES[found[1]]
    return stem + SUFFIXES[found[3]]


def axis_name(metric: str) -> str:
    """The same with the unit of an accuracy."""
    name = SHORT.get(metric) or metric_name(metric)
    return f"{name} (%)" if is_accuracy(metric) else name


def column_name(column: str, value: Any, full: bool = False) -> str:
    """A level in a heading: ``rate 0.05``; words stand alone, and what is missing is empty.

    Args:
        column: whose level it is.
        value: the level.
        full: whether words come with their column, too.
    """
    if value is None:
        return ""
    if column == "checkpoint":
        return CHECKPOINTS.get(value, str(value))
    if column == "metric":
        return SHORT.get(value) or metric_name(value)
    return plain(value) if isinstance(value, str) and not full else f"{column} {plain(value)}"


def plain(value: Any) -> str:
    """A level as text: floats without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def number(value: float, metric: str, like: float | None = None, sign: bool = False) -> str:
    """A value as a table has it: accuracies to a hundredth, counts whole, millions as such.

    Args:
        value: what to write.
        metric: whose value it is.
        like: the value whose unit and digits it is to share, as a half-width does with its mean.
        sign: whether a plus is written too.
    """
    value = float(value)
    size = abs(value if like is None else like)
    whole = value.is_integer() and (like is None or value == 0)
    plus = "+" if sign else ""
    if is_accuracy(metric):
        return f"{value:{plus}.2f}"
    if size >= 1e6:
        return f"{value / 1e6:{plus}.2f} M"
    if size >= 1000 or whole:
        return f"{value:{plus},.0f}"
    return f"{value:{plus}.2f}" if size >= 1 else f"{value:{plus}.3g}"
