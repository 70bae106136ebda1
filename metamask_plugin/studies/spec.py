"""What a study is: factors whose combinations, times the seeds, are its trials."""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.studies.levels import Level, levels_of, shipped
from metamask_plugin.studies.reference import reference
from metamask_plugin.studies.roots import dataset_of, located, of_one_folder, paths_in, remedy

SEEDS = (5, 6, 7)
"""Of a study that names none: three, so that every number has an interval."""


@dataclass(frozen=True)
class Trial:
    """One encoder, trained or taken from a checkpoint, and measured.

    Attributes:
        index: its number in the study, from 0.
        factors: the factors' values, by name.
        seed: of the training, or of the measures where nothing is trained.
        config: the pretraining config.
        overrides: of it, as on its command line, without the seed.
        epochs: factor on ``max_epochs``.
        checkpoint: an encoder that is there already.
        dataset: what it trains on, where that is one of the study's ``roots``.
    """

    index: int
    factors: Mapping[str, Any]
    seed: int
    config: str
    overrides: tuple[str, ...]
    epochs: float = 1.0
    checkpoint: str | None = None
    dataset: str | None = None

    @property
    def title(self) -> str:
        return ", ".join([*(str(value) for value in self.factors.values()), f"seed {self.seed}"])

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")


@dataclass(frozen=True)
class Study:
    """A table or figure as an experiment.

    Attributes:
        name: of its config.
        title: of its report.
        source: paper and table or figure.
        claim: what the paper says it shows.
        size: ``paper`` (its exact settings), ``digits`` (embedded data, minutes) or ``smoke`` (seconds).
        folder: where trials, results and report go.
        trials: all of them, seed by seed, so that an interrupted study has whole comparisons.
        factors: names of the factors, in the order of the results' columns.
        seeds: of each combination.
        measures: what is measured of each encoder: options by name.
        baseline: the level that the others are compared with in pairs, by factor; None where it is not among
            the levels.
        tables: layouts of the report's tables.
        figures: layouts of its figures.
        paper: the paper's own numbers: factor values, ``metric`` and ``value``.
        data: the ``data`` node for encoders that bring no training config.
        config: the resolved study config.
    """

    name: str
    title: str
    source: str
    claim: str
    size: str
    folder: Path
    trials: tuple[Trial, ...]
    factors: tuple[str, ...]
    seeds: tuple[int, ...]
    measures: Mapping[str, Mapping[str, Any]]
    baseline: Mapping[str, Any] | None = None
    tables: Sequence[Mapping[str, Any]] = ()
    figures: Sequence[Mapping[str, Any]] = ()
    paper: Sequence[Mapping[str, Any]] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def datasets(self) -> list[str]:
        """Names of the data sets that its trials train on and that have a root."""
        return _datasets(self.trials)


def study_of(cfg: DictConfig) -> Study:
    """Reads a study config.

    Args:
        cfg: composed from ``scripts/study``; ``trial`` and ``hydra`` are ignored.

    Raises:
        UserError: for what is missing or cannot be.
    """
    node = OmegaConf.to_container(cfg, resolve=True)
    for key in ("hydra", "trial", "calibrating"):
        node.pop(key, None)
    for key in ("name", "title", "config", "factors", "measures", "sizes"):
        check(
            bool(node.get(key)), key, "set", node.get(key), "give --config-name one of main_study.py --list"
        )
    size = node["sizes"][choose("size", node["size"], node["sizes"])] or {}
    user = node.get("overrides") or []
    if not isinstance(user, list):
        raise UserError(
            f"overrides must be a list, got {user!r}; give them behind --: -- task=byol optimizer.lr=1e-3"
        )
    factors = levels_of(node, size)
    seeds = node.get("seeds") or size.get("seeds") or node.get("paper_seeds") or SEEDS
    check(
        isinstance(seeds, list | tuple)
        and all(isinstance(seed, int) for seed in seeds)
        and len(set(seeds)) == len(seeds),
        "seeds",
        "a list of different integers like [5,6,7]",
        seeds,
    )
    measures = _measures(node, size)
    values = {name: {level.value for level in levels} for name, levels in factors.items()}
    baseline = node.get("baseline") or {}
    paper = []
    if node["size"] == "paper":  # of another size they would be numbers of another experiment
        for row in reference(node.get("paper"), node["name"]):
            if all(row[name] in values[name] for name in factors if name in row):
                paper.append(row)
    return Study(
        name=node["name"],
        title=node["title"],
        source=node.get("source", ""),
        claim=node.get("claim", ""),
        size=node["size"],
        folder=Path(node["dir"])
        / (node["name"] if node["size"] == "paper" else f"{node['name']}-{node['size']}"),
        trials=tuple(_of_datasets(_trials(node, size, factors, seeds), node)),
        factors=tuple(factors),
        seeds=tuple(seeds),
        measures=measures,
        baseline=baseline
        if baseline and all(baseline[name] in values.get(name, ()) for name in baseline)
        else None,
        tables=node.get("tables") or (),
        figures=node.get("figures") or (),
        paper=paper,
        data=node.get("data") or {},
        config=node,
    )


def _measures(node: Mapping[str, Any], size: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Options by measure: the user's, else those of this size, else the study's own."""
    own = shipped(node, "measures")
    measures = {}
    for name, given in node["measures"].items():
        options, before = given or {}, own.get(name) or {}
        users = {key: value for key, value in options.items() if own and value != before.get(key)}
        measures[name] = {**options, **((size.get("measures") or {}).get(name) or {}), **users}
    return measures


def _filled(override: str, values: Mapping[str, Any]) -> str:
    """``method_kwargs.alpha={alpha}`` with the value of the factor ``alpha``."""
    for name, value in values.items():
        override = override.replace(f"{{{name}}}", str(value))
    return override


def _of_datasets(trials: Sequence[Trial], node: Mapping[str, Any]) -> list[Trial]:
    """The trials of the data sets that were asked for.

    Raises:
        UserError: for one that the study has not, or one folder for several.
    """
    there, asked = _datasets(trials), node.get("datasets")
    for name in asked or ():
        choose("datasets", name, there or node.get("roots") or {})
    if asked and there:
        kept = [trial for trial in trials if trial.dataset in (None, *asked)]
        trials = [replace(trial, index=index) for index, trial in enumerate(kept)]
        there = _datasets(trials)
    paths = paths_in(node.get("overrides") or [])
    expected = f"without paths in a study of several data sets ({', '.join(there)})"
    check(
        len(there) < 2 or not paths,
        "overrides",
        expected,
        " ".join(paths),
        remedy(there, there[:1]),
    )
    both = [] if paths else of_one_folder({name: node["roots"][name] for name in there})
    check(
        not both,
        f"roots.{both[-1] if both else ''}",
        f"another folder than roots.{both[0] if both else ''}, as it has images by class",
        both and node["roots"][both[0]],
        remedy(both[1:], both[:1]) if both else "",
    )
    return list(trials)


def _datasets(trials: Sequence[Trial]) -> list[str]:
    return list(dict.fromkeys(trial.dataset for trial in trials if trial.dataset))


def _trials(
    node: Mapping[str, Any],
    size: Mapping[str, Any],
    factors: Mapping[str, Sequence[Level]],
    seeds: Sequence[int],
) -> list[Trial]:
    user = node.get("overrides") or []
    trials = []
    for seed in seeds:
        for combination in itertools.product(*factors.values()):
            configs = [level.config for level in combination if level.config]
            config = configs[-1] if configs else node["config"]
            if size.get("embedded"):  # the same method's config for the data that comes with the package
                config = config.rsplit("/", 1)[-1]
            checkpoints = [level.checkpoint for level in combination if level.checkpoint]
            epochs = 1.0
            for level in combination:
                epochs *= level.epochs
            checkpoint = checkpoints[-1] if checkpoints else None
            values = {name: level.value for name, level in zip(factors, combination)}
            overrides = [
                *(node.get("settings") or ()),
                *(override for level in combination for override in level.overrides),
                *(size.get("settings") or ()),
            ]
            dataset = None if checkpoint else dataset_of(config, [*overrides, *user])
            root = (node.get("roots") or {}).get(dataset)
            check(root is None or isinstance(root, str), f"roots.{dataset}", "a folder", root)
            if root is not None and not paths_in(user):
                overrides += located(root)
            trials.append(
                Trial(
                    index=len(trials),
                    factors=values,
                    seed=seed,
                    config=config,
                    overrides=tuple(_filled(override, values) for override in [*overrides, *user]),
                    epochs=epochs,
                    checkpoint=checkpoint,
                    dataset=None if root is None else dataset,
                )
            )
    return trials
