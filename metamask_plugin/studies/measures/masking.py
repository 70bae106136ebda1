"""Masks over the dimensions of a frozen encoder: MetaMask's Figs. 2, 8 and 9, and the confounder audit."""

import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from metamask_plugin.errors import check
from metamask_plugin.evaluation.audit import audit, check_options, random_mask_rows
from metamask_plugin.evaluation.dimension_masks import below_average
from metamask_plugin.evaluation.features import Progress
from metamask_plugin.evaluation.linear import linear_probe
from metamask_plugin.evaluation.mask_figures import audit_figure
from metamask_plugin.studies.subject import Measured, Subject


def random_masking(
    subject: Subject,
    rates: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5),
    draws: int = 100,
    classifiers: Sequence[str] = ("knn5", "linear"),
    protocol: str = "paper",
) -> Measured:
    """Accuracy under random masks: a point a mask, and for each rate what the masks come to.

    Rows with ``classifier`` and ``rate``: ``masked`` (with ``draw``; rate 0 is the unmasked encoder), and
    ``mean``, ``std``, ``lowest``, ``best`` and ``share_above``, the percentage of masks above the unmasked
    accuracy. How much of what the best mask gains would be there on other images is the audit's question.

    Args:
        subject: the encoder and its images.
        rates: shares of the dimensions to drop.
        draws: masks a rate.
        classifiers: ``knn<k>``; or a probe that is fitted anew under each mask: ``linear`` by least squares,
            ``mlp`` by training.
        protocol: of the MLP, see :func:`~metamask_plugin.evaluation.linear.linear_probe`.
    """
    rows = []
    for classifier in classifiers:
        rows += _summarised(_points(subject, [0.0, *rates], draws, classifier, protocol=protocol), classifier)
    return Measured(rows)


def learned_mask(
    subject: Subject,
    rates: Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    draws: int = 10,
    classifier: str = "knn5",
    protocol: str = "paper",
) -> Measured:
    """Masks among the dimensions whose learned weight is below average alone (A.4.7).

    The rows of :func:`random_masking`, with the rates 0 and 1, and ``linear`` on all dimensions, on those
    above average alone, on those below average alone (``linear_above_average_only`` ...);
    ``below_average``: how many these are.

    Args:
        subject: an encoder with a learned mask.
        rates: shares of the dimensions below average to drop.
        draws: masks a rate; the rates 0 and 1 have one.
        classifier: as in :func:`random_masking`.
        protocol: of the linear probe.
    """
    remedy = "take a run of MetaMask's"
    check(subject.mask is not None, "encoder", "one with a learned mask", subject.title, remedy)
    below = below_average(subject.mask)
    check(
        bool(below.any()), "learned mask", "one with weights below its average", "all equal", "train longer"
    )
    between = [rate for rate in rates if 0 < rate < 1]
    rows = _summarised(_points(subject, [0.0, *between, 1.0], draws, classifier, below), classifier)
    for name, kept in (("", None), ("_above_average_only", ~below), ("_below_average_only", below)):
        result = linear_probe(
            subject.features("train"),
            subject.features("test"),
            subject.data.num_classes,
            protocol,
            seed=subject.seed,
            device=subject.device,
            mask=None if kept is None else kept.float(),
        )
        rows.append({"metric": f"linear{name}", "value": result.acc1_last})
    rows.append({"metric": "below_average", "value": float(below.sum())})
    return Measured(rows)


def confounder_audit(
    subject: Subject,
    classifier: str = "knn20",
    rates: Sequence[float] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9),
    draws: int = 100,
    banzhaf_masks: int | None = None,
    removal: str = "banzhaf",
) -> Measured:
    """Which dimensions hurt, chosen on one half of the test images and confirmed on the other.

    The options are those of :func:`~metamask_plugin.evaluation.audit.audit`. All it finds is in the details,
    the verdict in words, too; the rows have its main numbers, gains in percentage points.
    """
    check_options(subject.dimensions, draws, banzhaf_masks, removal)
    with _shown("masks") as progress:
        result = audit(
            subject.features("train"),
            subject.features("test"),
            metric=classifier,
            rates=rates,
            draws=draws,
            banzhaf_masks=banzhaf_masks,
            removal=removal,
            weights=subject.mask,
            seed=subject.seed,
            device=subject.device,
            progress=progress,
            originals=subject.data.images("test").originals,
        )
    gain = result.removal.held_out_gain
    found = {
        "unmasked": result.accuracy["all"],
        "harmful_dimensions": float(len(result.harmful)),
        "helpful_dimensions": float(result.helpful),
        "removed": float(result.removal.chosen),
        "selection_gain": result.removal.selection_gain,
        "held_out_gain": gain.value,
        "held_out_gain_low": gain.low,
        "held_out_gain_high": gain.high,
    }
    rows = [{"metric": metric, "value": float(value)} for metric, value in found.items()]
    return Measured(rows, {"audit.png": audit_figure(result, subject.title)}, result.to_dict())


def _points(
    subject: Subject,
    rates: Sequence[float],
    draws: int,
    classifier: str,
    among: torch.Tensor | None = None,
    protocol: str = "paper",
) -> list[dict[str, Any]]:
    """Rows ``rate``, ``draw`` and ``value``: the accuracy under each mask."""
    train, test = subject.features("train"), subject.features("test")

    def mlp(masks: torch.Tensor) -> list[float]:
        found = []
        for mask in masks:
            where = (subject.seed, subject.device, mask.float())
            result = linear_probe(train, test, subject.data.num_classes, protocol, "mlp", *where)
            found.append(result.acc1_last)
            progress(len(found), len(masks))
        return found

    with _shown(f"masks, {classifier}") as progress:
        return random_mask_rows(
            train,
            test,
            rates,
            draws,
            classifier,
            among,
            subject.seed,
            subject.device,
            progress,
            mlp if classifier == "mlp" else None,
        )


def _summarised(points: Sequence[Mapping[str, Any]], classifier: str) -> list[dict[str, Any]]:
    """A row for each mask, and for each rate what its masks come to."""
    where = {"classifier": classifier}
    rows = [
        {**where, "rate": row["rate"], "draw": row["draw"], "metric": "masked", "value": row["value"]}
        for row in points
    ]
    unmasked = next(row["value"] for row in points if row["rate"] == 0)
    for rate in dict.fromkeys(row["rate"] for row in points):
        values = [row["value"] for row in points if row["rate"] == rate]
        found = {
            "mean": statistics.fmean(values),
            "std": statistics.stdev(values) if len(values) > 1 else 0.0,
            "lowest": min(values),
            "best": max(values),
            "share_above": 100 * statistics.fmean(value > unmasked for value in values),
        }
        rows += [{**where, "rate": rate, "metric": metric, "value": value} for metric, value in found.items()]
    return rows


@contextmanager
def _shown(title: str) -> Iterator[Progress]:
    """A bar on a terminal, for what takes long."""
    with tqdm(desc=title, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
