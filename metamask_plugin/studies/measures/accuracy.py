"""kNN and probe accuracy, last and best epoch, unmasked and masked."""

from collections.abc import Mapping, Sequence
from typing import Any

from metamask_plugin.evaluation.features import feature_std
from metamask_plugin.evaluation.knn import PAPER_K, PAPER_TEMPERATURE, knn_table, vote_temperature
from metamask_plugin.evaluation.linear import linear_probe
from metamask_plugin.studies.subject import Measured, Subject

RELEASE_COLUMNS = (f"knn{PAPER_K}_masked", f"knn{PAPER_K}")
"""What MetaMask's release reports, the first that there is."""


def accuracy(
    subject: Subject,
    ks: Sequence[int] = (5, 20, 200),
    temperature: float | None = None,
    protocol: str | None = "paper",
    head: str = "linear",
    masked: bool = True,
) -> Measured:
    """Rows ``knn<k>``, ``<head>``, ``<head>_best`` (epoch of the probe), ``<head>_top5``, ``feature_std``.

    A method with a mask has the same once more with ``_masked``. ``knn_release`` is one row for a run: k = 5,
    votes exp(cosine), masked where there is a mask, the best of the evaluated epochs. A frozen checkpoint has
    that epoch's value.

    Args:
        subject: the encoder and its images.
        ks: numbers of neighbours.
        temperature: of their votes; by default 1 for k = 5 and 0.07 for any other.
        protocol: of the probe, see :func:`~metamask_plugin.evaluation.linear.linear_probe`; None for none.
        head: ``linear`` or ``mlp``.
        masked: whether masked features are evaluated, too.
    """

    def rows(checkpoint: str) -> list[dict[str, Any]]:
        train, test = (subject.features(split, checkpoint) for split in ("train", "test"))
        mask = subject.encoders[checkpoint].mask if masked else None
        found = knn_table(train, test, mask, tuple(ks), temperature, device=subject.device)
        weights = {"": None} | ({} if mask is None else {"_masked": mask})
        for suffix, weight in weights.items() if protocol is not None else ():
            result = linear_probe(
                train, test, subject.data.num_classes, protocol, head, subject.seed, subject.device, weight
            )
            found[f"{head}{suffix}"] = result.acc1_last
            found[f"{head}_best{suffix}"] = result.acc1_best
            found[f"{head}_top5{suffix}"] = result.acc5_last
        found["feature_std"] = feature_std(test.feats)
        return [{"metric": metric, "value": value} for metric, value in found.items()]

    return Measured([*subject.by_checkpoint(rows), *_release(subject)])


def _release(subject: Subject) -> list[dict[str, Any]]:
    """``knn_release``: nothing where the run did not evaluate k = 5 at temperature 1."""
    if subject.folder is None:
        features = [subject.features(split) for split in ("train", "test")]
        epochs = [knn_table(*features, subject.mask, (PAPER_K,), PAPER_TEMPERATURE, device=subject.device)]
    elif _as_released(subject.encoders["last"].args):
        epochs = subject.history()
    else:
        return []
    for column in RELEASE_COLUMNS:
        values = [float(epoch[column]) for epoch in epochs if epoch.get(column) not in (None, "")]
        if values:
            return [{"metric": "knn_release", "value": max(values)}]
    return []


def _as_released(args: Mapping[str, Any]) -> bool:
    knn = (args.get("evaluation") or {}).get("knn") or {}
    return vote_temperature(PAPER_K, knn.get("temperature")) == PAPER_TEMPERATURE
