"""How alike the dimensions of the features are: MetaMask's Fig. 1a and three numbers for it."""

from typing import Any

from metamask_plugin.evaluation.redundancy import redundancy_numbers, similarity_figure
from metamask_plugin.studies.subject import Measured, Subject


def similarity(subject: Subject) -> Measured:
    """Rows ``mean_correlation``, ``effective_rank``, ``participation_ratio``; the figure as a picture."""

    def rows(checkpoint: str) -> list[dict[str, Any]]:
        numbers = redundancy_numbers(subject.features("test", checkpoint))
        return [{"metric": metric, "value": value} for metric, value in numbers.items()]

    figure = similarity_figure({subject.title: subject.features("test")})
    return Measured(subject.by_checkpoint(rows), {"similarity.png": figure})
