"""kNN and probe accuracy, last and best epoch, unmasked and masked."""

from collections.abc import Sequence
from typing import Any

from metamask_plugin.evaluation.features import feature_std
from metamask_plugin.evaluation.knn import knn_table
from metamask_plugin.evaluation.linear import linear_probe
from metamask_plugin.studies.subject import Measured, Subject


def accuracy(
    subject: Subject,
    ks: Sequence[int] = (5, 20, 200),
    temperature: float = 0.07,
    protocol: str | None = "paper",
    head: str = "linear",
    masked: bool = True,
) -> Measured:
    """Rows ``knn<k>``, ``<head>``, ``<head>_best`` (epoch of the probe), ``<head>_top5``, ``feature_std``.

    A method with a mask has the same once more with ``_masked``.

    Args:
        subject: the encoder and its images.
        ks: numbers of neighbours.
        temperature: of their votes.
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
            found[f"{head}_top5{suffix}"] = result.acc5
        found["feature_std"] = feature_std(test.feats)
        return [{"metric": metric, "value": value} for metric, value in found.items()]

    return Measured(subject.by_checkpoint(rows))
