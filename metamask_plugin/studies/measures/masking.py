"""Masks over the dimensions of a frozen encoder: MetaMask's Figs. 2, 8 and 9, and the confounder audit."""

import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

from metamask_plugin.audit import audit, below_average, masked_correct, random_masks
from metamask_plugin.audit.confounders import RATES, check_options
from metamask_plugin.errors import check
from metamask_plugin.evaluation.features import Progress
from metamask_plugin.evaluation.knn import vote_temperature
from metamask_plugin.evaluation.linear import linear_probe
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
    rows = [_rows(subject, [0.0, *rates], draws, each, protocol=protocol) for each in classifiers]
    return Measured(sum(rows, []))


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
    expected = "one with weights below its average"
    check(bool(below.any()), "learned mask", expected, "all equal", "train longer")
    between = [rate for rate in rates if 0 < rate < 1]
    rows = _rows(subject, [0.0, *between, 1.0], draws, classifier, below)
    everything = torch.ones_like(below)
    kept = {"": everything, "_above_average_only": ~below, "_below_average_only": below}
    for name, mask in kept.items():
        rows.append({"metric": f"linear{name}", "value": _probe(subject, mask, protocol)})
    rows.append({"metric": "below_average", "value": float(below.sum())})
    return Measured(rows)


def confounder_audit(
    subject: Subject,
    classifier: str = "knn20",
    rates: Sequence[float] = RATES,
    draws: int = 100,
    banzhaf_masks: int | None = None,
    removal: str = "banzhaf",
) -> Measured:
    """Which dimensions hurt, chosen on one half of the test images and confirmed on the other.

    The options are those of :func:`metamask_plugin.audit.audit`. All it finds is in the details, the verdict
    in words, too; the rows have its main numbers, gains in percentage points.
    """
    check_options(subject.encoders["last"].dim, draws, banzhaf_masks, removal)
    with _shown("masks") as progress:
        result = audit(
            *subject.features("train"),
            *subject.features("test"),
            classifier,
            temperature=_temperature(classifier),
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
        "harmful_dimensions": len(result.harmful),
        "helpful_dimensions": result.helpful,
        "removed": result.removal.chosen,
        "selection_gain": result.removal.selection_gain,
        "held_out_gain": gain.value,
        "held_out_gain_low": gain.low,
        "held_out_gain_high": gain.high,
    }
    rows = [{"metric": metric, "value": float(value)} for metric, value in found.items()]
    return Measured(rows, {"audit.png": result.plot(subject.title)}, result.to_dict())


def _rows(
    subject: Subject,
    rates: Sequence[float],
    draws: int,
    classifier: str,
    among: torch.Tensor | None = None,
    protocol: str = "paper",
) -> list[dict[str, Any]]:
    """A row for each mask, and for each rate what its masks come to; rates 0 and 1 have one mask."""
    train, test = subject.features("train"), subject.features("test")
    dim, generator = train.feats.shape[1], torch.Generator().manual_seed(subject.seed)
    masks = [random_masks(dim, rate, 1 if rate in (0, 1) else draws, generator, among) for rate in rates]
    together = torch.cat(masks)
    with _shown(f"masks, {classifier}") as progress:
        if classifier == "mlp":
            values = []
            for mask in together:
                values.append(_probe(subject, mask, protocol, "mlp"))
                progress(len(values), len(together))
        else:
            options = {"device": subject.device, "progress": progress}
            correct = masked_correct(train, test, together, classifier, _temperature(classifier), **options)
            values = (100 * correct.double().mean(dim=1)).tolist()
    unmasked, rows, summary = values[rates.index(0)], [], []
    for rate, drawn in zip(map(float, rates), masks):
        own, values = values[: len(drawn)], values[len(drawn) :]
        found = {
            "mean": statistics.fmean(own),
            "std": statistics.stdev(own) if len(own) > 1 else 0.0,
            "lowest": min(own),
            "best": max(own),
            "share_above": 100 * statistics.fmean(value > unmasked for value in own),
        }
        where = {"classifier": classifier, "rate": rate}
        rows += [
            {**where, "draw": draw, "metric": "masked", "value": value} for draw, value in enumerate(own)
        ]
        summary += [{**where, "metric": metric, "value": value} for metric, value in found.items()]
    return rows + summary


def _probe(subject: Subject, mask: torch.Tensor, protocol: str, head: str = "linear") -> float:
    """Accuracy of a probe that is trained on the masked features."""
    features, classes = (subject.features("train"), subject.features("test")), subject.data.num_classes
    settings = (protocol, head, subject.seed, subject.device)
    return linear_probe(*features, classes, *settings, mask.float()).acc1_last


def _temperature(classifier: str) -> float:
    """Of the votes of ``knn<k>``; a probe has none."""
    k = re.fullmatch(r"knn(\d+)", classifier)
    return vote_temperature(int(k[1]) if k else 0)


@contextmanager
def _shown(title: str) -> Iterator[Progress]:
    """A bar on a terminal, for what takes long."""
    with tqdm(desc=title, leave=False, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int | None) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield progress
