"""Full images, foregrounds and backgrounds, after ICL-MSR's Figs. 1 and 4."""

from typing import Any

from metamask_plugin.evaluation.regions import region_accuracies
from metamask_plugin.studies.subject import Measured, Subject


def regions(
    subject: Subject, fit_on: str = "trained", k: int = 5, protocol: str | None = "paper", form: str = "fill"
) -> Measured:
    """Rows ``knn<k>`` and ``linear`` for each region in the column ``tested on``.

    Args:
        subject: the encoder and its images, which must have boxes.
        fit_on: see :func:`~metamask_plugin.evaluation.regions.region_accuracies`, as for the rest.
        k: number of neighbours.
        protocol: of the probe; None for none.
        form: how a foreground is shown.
    """
    subject.data.require_boxes()

    def rows(checkpoint: str) -> list[dict[str, Any]]:
        encoder = subject.encoders[checkpoint]
        found = region_accuracies(
            encoder.backbone,
            lambda split, region: subject.data.evaluation_loader(split, region=region, form=form),
            encoder.trained_on,
            fit_on,
            k,
            protocol=protocol,
            seed=subject.seed,
            device=subject.device,
        )
        return [
            {"tested on": row["tested on"], "metric": metric, "value": value}
            for row in found
            for metric, value in row.items()
            if metric != "tested on"
        ]

    return Measured(subject.by_checkpoint(rows))
