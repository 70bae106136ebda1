"""What a study measures of an encoder: each from a subject to tidy rows, pictures and details."""

from collections.abc import Callable

from metamask_plugin.studies.measures.accuracy import accuracy
from metamask_plugin.studies.measures.cost import cost
from metamask_plugin.studies.measures.few_labels import few_labels
from metamask_plugin.studies.measures.masking import confounder_audit, learned_mask, random_masking
from metamask_plugin.studies.measures.regions import regions
from metamask_plugin.studies.measures.similarity import similarity
from metamask_plugin.studies.subject import Measured

MEASURES: dict[str, Callable[..., Measured]] = {
    "accuracy": accuracy,
    "confounder_audit": confounder_audit,
    "cost": cost,
    "few_labels": few_labels,
    "learned_mask": learned_mask,
    "random_masking": random_masking,
    "regions": regions,
    "similarity": similarity,
}
"""By the name that a study config's ``measures`` has."""
