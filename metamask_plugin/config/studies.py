"""Every key of a study's config; factors, tables and figures have a grammar of their own."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from metamask_plugin.config.fields import (
    Anything,
    Block,
    Count,
    FolderName,
    Keywords,
    Natural,
    NonNegative,
    Path,
    Positive,
    PositiveShare,
    Seed,
    Share,
    Text,
    key,
)
from metamask_plugin.config.linear import Head
from metamask_plugin.config.pretraining import Protocol, RegionForm


class Study(Block):
    """A study's config. Null leaves a key to the study."""

    name: FolderName = key(..., "of its folder")
    title: Text | None = key(None, "of the report")
    source: Text | None = key(None, "paper, and table or figure")
    claim: Text | None = key(None, "what the paper says it shows")
    size: Text | None = key(None, "paper, digits or smoke")
    seeds: list[Seed] | None = key(None, "of every combination")
    paper_seeds: list[Seed] | None = key(None, "where seeds is null")
    dir: Path | None = key(None, "trials, results and report go to <dir>/<name>")
    runs_dir: Path | None = key(None, "the pretraining runs, shared by all studies")
    overrides: list[Text] | None = key(None, "of the pretraining config, behind --")
    checkpoint: Anything = key(None, "encoders that are there already: a path, or a list")
    data: Keywords | None = key(None, "for checkpoints: over what the encoder was trained on")
    report_only: bool | None = key(None, "writes the report over what is finished")
    minutes: NonNegative | None = key(None, "no new trial is begun after so many")
    quiet: bool | None = key(None, "trials print to files")
    trial: Natural | None = key(None, "set by the sweeper")
    calibrating: bool | None = key(None, "set by the sweeper")
    config: Text | None = key(None, "the pretraining config")
    settings: list[Text] | None = key(None, "overrides of every trial")
    factors: Keywords | None = key(None, "levels by factor")
    measures: Keywords | None = key(None, "options by measure")
    baseline: Keywords | None = key(None, "the level that others are compared with")
    tables: list[Keywords] | None = key(None, "of the report")
    figures: list[Keywords] | None = key(None, "of the report")
    paper: Anything = key(
        None, "the paper's numbers: grids, or the study whose they are; null for its own name's"
    )
    roots: Keywords | None = key(None, "folders by data set")
    datasets: list[Text] | None = key(None, "whose trials are run, keys of roots; null for all")
    equal_time: Keywords | None = key(None, "as long a training for all")
    sizes: Keywords | None = key(None, "what a size changes")
    small_arms: Anything = key(None, "levels that other keys refer to")
    smoke_arms: Anything = key(None, "levels that other keys refer to")


KNN = r"knn[1-9]\d*"
NeighboursOrLinear = Annotated[str, Field(pattern=f"^({KNN}|linear)$")]
Classifier = Annotated[str, Field(pattern=f"^({KNN}|linear|mlp)$")]


class Accuracy(Block):
    """``measures.accuracy``."""

    ks: list[Count] = key(None, "numbers of neighbours", expected="a list of k")
    temperature: Positive = key(None, "of the votes")
    protocol: Protocol = key(None, "of the probe")
    head: Head = key(None, "of the probe")


class ConfounderAudit(Block):
    """``measures.confounder_audit``."""

    classifier: NeighboursOrLinear = key(None, "of the features", expected="knn<k> or linear")
    rates: list[Share] = key(None, "shares of the dimensions to drop")
    draws: Count = key(None, "masks of each rate")
    banzhaf_masks: Annotated[int, Field(ge=3, le=10**9)] = key(None, "random sets of dimensions")
    removal: Literal["banzhaf", "leave_one_out", "greedy"] = key(None, "the order of the removal")


class FewLabels(Block):
    """``measures.few_labels``."""

    fractions: list[PositiveShare] = key(None, "shares of the labels")
    epochs: Count = key(None, "instead of the protocol's")
    batch_size: Count = key(None, "instead of the protocol's")
    lr: Positive = key(None, "instead of the protocol's")
    subset_seed: Seed = key(None, "of the draw")


class LearnedMask(Block):
    """``measures.learned_mask``."""

    rates: list[Share] = key(None, "shares of the dimensions to drop")
    draws: Count = key(None, "masks of each rate")
    classifier: Classifier = key(None, "of the features", expected="knn<k>, linear or mlp")
    protocol: Protocol = key(None, "of the probe")


class RandomMasking(Block):
    """``measures.random_masking``."""

    rates: list[Share] = key(None, "shares of the dimensions to drop")
    draws: Count = key(None, "masks of each rate")
    classifiers: list[Classifier] = key(None, "of the features")
    protocol: Protocol = key(None, "of the probe")


class Regions(Block):
    """``measures.regions``."""

    fit_on: Literal["trained", "tested"] = key(None, "what the classifier learns from")
    k: Count = key(None, "neighbours")
    protocol: Protocol = key(None, "of the probe")
    form: RegionForm = key(None, "how a foreground is shown")


MEASURES: Mapping[str, type[Block]] = {
    "accuracy": Accuracy,
    "confounder_audit": ConfounderAudit,
    "cost": Block,
    "few_labels": FewLabels,
    "learned_mask": LearnedMask,
    "random_masking": RandomMasking,
    "regions": Regions,
    "similarity": Block,
}
"""Options of the measures, by measure; whether null is accepted is in their signatures."""
