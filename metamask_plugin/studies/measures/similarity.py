"""How alike the dimensions of the features are: MetaMask's Fig. 1a and three numbers for it."""

from metamask_plugin.evaluation.redundancy import redundancy_numbers, similarity_figure
from metamask_plugin.studies.subject import Measured, Subject


def similarity(subject: Subject) -> Measured:
    """Rows ``mean_correlation``, ``effective_rank``, ``participation_ratio``; the figure as a picture."""
    rows = []
    for checkpoint in subject.encoders:
        numbers = redundancy_numbers(subject.features("test", checkpoint))
        rows += [
            {"checkpoint": checkpoint, "metric": name, "value": value} for name, value in numbers.items()
        ]
    figure = similarity_figure({subject.title: subject.features("test")})
    return Measured(rows, {"similarity.png": figure})
