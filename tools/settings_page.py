"""Writes docs/settings.md: what the papers say of each setting, and what the configs and studies compose.

    python tools/settings_page.py            # rewrites the page
    python tools/settings_page.py --check    # says whether it is as it would be written

The papers' statements are in tools/settings.yaml, our values are read from the composed configs.
"""

import argparse
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from fnmatch import fnmatchcase
from functools import cache
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.config import DEFAULTS
from metamask_plugin.cli.pretrain import shipped_configs
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.knn import vote_temperature
from metamask_plugin.evaluation.linear import PROTOCOLS
from metamask_plugin.methods import METHODS
from metamask_plugin.studies.measures import MEASURES
from metamask_plugin.studies.pretraining import pretraining_config
from metamask_plugin.studies.spec import Study, Trial, study_of
from metamask_plugin.tasks import TASKS

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "tools" / "settings.yaml"
PAGE = ROOT / "docs" / "settings.md"
HEADER = ("§", "the paper", "for", "key", "paper", "here", "why")
COUNTED = {"data.num_classes": 10, "data.num_large_crops": 2, "data.num_small_crops": 0}
"""No settings: a training counts them in its data and views, and a method wants them there."""

Node = Mapping[str, Any]


@cache
def names() -> list[str]:
    """Of every shipped pretraining config, probe and study: ``pretrain/cifar/metamask_barlow``."""
    probes = sorted(
        path.relative_to(SCRIPTS).with_suffix("") for path in (SCRIPTS / "linear").rglob("*.yaml")
    )
    studies = sorted(path.stem for path in (SCRIPTS / "study").glob("*.yaml") if path.stem != "base")
    pretraining = [f"pretrain/{name}" for name in shipped_configs()]
    return [*pretraining, *(path.as_posix() for path in probes), *(f"study/{name}" for name in studies)]


def groups() -> list[dict[str, Any]]:
    """Of statements, as in the source; what a group has in common stands in each of its statements."""
    found = OmegaConf.to_container(OmegaConf.load(SOURCE))
    for group in found:
        for statement in group["statements"]:
            statement["own"] = {key: statement.get(key) for key in ("of", "where", "with")}
            statement["where"] = {**group.get("where", {}), **statement.get("where", {})}
            for key in ("of", "with"):
                statement.setdefault(key, group.get(key))
    return found


def matching(patterns: list[str]) -> list[str]:
    """The names that a statement is about."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names()):
            raise UserError(f"of must match a config or a study, got {pattern!r}")
    return [name for name in names() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def values(statement: Node) -> dict[str, list[Any]]:
    """The different values of a statement's key, by name of the config or study."""
    found: dict[str, list[Any]] = {}
    for name in matching(statement["of"]):
        for node in _nodes(name, tuple(statement["with"] or ()), statement["where"]):
            value = _evaluated(node, statement["key"], name)
            if value not in found.setdefault(name, []):
                found[name].append(value)
    return found


def agrees(found: Any, value: Any) -> bool:
    """Whether a composed value is the paper's; numbers up to rounding."""
    if isinstance(value, list):
        return isinstance(found, list) and len(found) == len(value) and all(map(agrees, found, value))
    if isinstance(value, int | float) and isinstance(found, int | float):
        return math.isclose(found, value, rel_tol=1e-9)
    return found == value


def _nodes(name: str, overrides: tuple[str, ...], where: Node) -> Iterator[Node]:
    root, _, config = name.partition("/")
    if root == "study":
        study = _study(config)
        for trial in _trials(study, where):
            yield {**_composed_trial(config, trial.index), **_measured(study)}
    else:
        yield _composed(root, config, overrides)


@cache
def _study(name: str) -> Study:
    with initialize_config_dir(str((SCRIPTS / "study").resolve()), version_base="1.2"):
        return study_of(compose(name))


def _trials(study: Study, where: Node) -> list[Trial]:
    """Those of the levels asked for that differ from the first of them in one factor at most."""
    found = []
    for trial in study.trials:
        asked = [(trial.factors[name], patterns) for name, patterns in where.items() if name in trial.factors]
        if trial.seed == study.seeds[0] and all(
            any(fnmatchcase(str(level), str(pattern)) for pattern in patterns) for level, patterns in asked
        ):
            found.append(trial)
    if not found:
        raise UserError(f"where must match a trial of {study.name}, got {where}")
    first = found[0].factors
    return [trial for trial in found if sum(trial.factors[name] != first[name] for name in first) <= 1]


@cache
def _composed_trial(study: str, index: int) -> Node:
    return _completed(pretraining_config(_study(study), _study(study).trials[index]))


@cache
def _composed(root: str, config: str, overrides: tuple[str, ...]) -> Node:
    with initialize_config_dir(str((SCRIPTS / root).resolve()), version_base="1.2"):
        cfg = compose(config, list(overrides))
    if root == "linear":
        protocol = PROTOCOLS.get(cfg.get("protocol"))  # of another one the optimizer block is the protocol
        return {**OmegaConf.to_container(cfg), "probe": asdict(protocol) if protocol else {}}
    return _completed(cfg)


def _completed(cfg: DictConfig) -> Node:
    """With the defaults of the package, of the method and of the task."""
    OmegaConf.set_struct(cfg, False)
    for key, value in {**DEFAULTS, **COUNTED}.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value, force_add=True)
    node = OmegaConf.to_container(METHODS[cfg.method].add_and_assert_specific_cfg(cfg), resolve=True)
    kwargs = node["method_kwargs"]
    kwargs["task_kwargs"] = _defaults(TASKS[kwargs["task"]]) | kwargs["task_kwargs"]
    return node


def _measured(study: Study) -> Node:
    """What a study says beside its pretraining; settings.yaml lists the keys."""
    measures = {name: _defaults(MEASURES[name]) | dict(given) for name, given in study.measures.items()}
    protocols = [options["protocol"] for options in measures.values() if options.get("protocol")]
    return {
        "measures": measures,
        "probe": asdict(PROTOCOLS[protocols[0]]) if protocols else {},
        "factors": {
            name: list(dict.fromkeys(trial.factors[name] for trial in study.trials)) for name in study.factors
        },
        "votes_of_5": vote_temperature(5, measures.get("accuracy", {}).get("temperature")),
        "reference": sorted({row["metric"] for row in study.paper}),
    }


def _defaults(function: Any) -> dict[str, Any]:
    parameters = signature(function).parameters.values()
    found = {entry.name: entry.default for entry in parameters if entry.default is not Parameter.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _evaluated(node: Node, key: str, name: str) -> Any:
    """A key's value; ``a.{b,c}`` is a list, ``a.b * a.c / 256`` a number."""
    several = re.fullmatch(r"(.*)\{(.*)\}(.*)", key)
    if several:
        before, parts, after = several.groups()
        return [_evaluated(node, before + part.strip() + after, name) for part in parts.split(",")]
    first, *rest = re.split(r" ([*/]) ", key)
    value = _read(node, first, name)
    for operator, operand in zip(rest[::2], rest[1::2]):
        by = float(operand) if operand[0].isdigit() else _read(node, operand, name)
        value = value * by if operator == "*" else value / by
    return value


def _read(node: Any, key: str, name: str) -> Any:
    for part in key.split("."):
        try:
            node = node[int(part) if isinstance(node, list) else part]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{name} must have the key {key}, got none called {part}") from error
    return node


def page() -> str:
    """The page's text."""
    found = groups()
    statements = [statement for group in found for statement in group["statements"]]
    different = sum("deviation" in statement for statement in statements)
    lines = [
        "# Settings: the papers and the configs",
        "",
        "<!-- Written by tools/settings_page.py from tools/settings.yaml and the configs: make settings -->",
        "",
        f"{len(statements)} settings of the pretraining configs, the probes and the studies at `size=paper`: "
        "what the paper or its release says, the key, the paper's value, and the composed one. "
        f"**Bold**: ours differs ({different} times), and the last column says why. "
        "A dash: the paper gives none, and the last column says what was chosen. "
        "A key in braces is a list. Where ours stands alone it is so in all that the table or row is for. "
        "[method.md](method.md) has what the papers leave open in their equations.",
    ]
    for group in found:
        lines += [
            "",
            f"## {group['title']}",
            "",
            f"{group['about']} In: {_labels(matching(group['of']))}.",
            "",
        ]
        lines += ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
        lines += [_row(statement) for statement in group["statements"]]
    return "\n".join(lines) + "\n"


def _row(statement: Node) -> str:
    sentence, own = statement["sentence"], statement["own"]
    named = [] if own["of"] is None else [_labels(matching(own["of"]))]
    named += [f"`{override}`" for override in own["with"] or ()]
    named += [f"{factor}: {', '.join(map(str, levels))}" for factor, levels in (own["where"] or {}).items()]
    here = _here(values(statement)) if "key" in statement else statement["here"]
    reasons = [statement[kind] for kind in ("deviation", "chosen", "note") if kind in statement]
    cells = (
        statement["section"],
        "–" if sentence == "-" else f"“{sentence}”",
        "; ".join(named),
        f"`{statement['key']}`" if "key" in statement else "–",
        "–" if statement["value"] is None else _text(statement["value"]),
        f"**{here}**" if "deviation" in statement else here,
        " ".join(reasons),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _here(found: Mapping[str, list[Any]]) -> str:
    """One value, or each with where it is."""
    by_value: dict[str, list[str]] = {}
    for name, several in found.items():
        by_value.setdefault(" or ".join(map(_text, several)), []).append(name)
    if len(by_value) == 1:
        return next(iter(by_value))
    return "; ".join(f"{value} ({_labels(where)})" for value, where in by_value.items())


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"[{_text(item)}]" if isinstance(item, list) else _text(item) for item in value)
    if isinstance(value, bool) or value is None:
        return str(value).lower().replace("none", "null")
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _labels(found: list[str]) -> str:
    """Short names: ``cifar``, ``probe cifar``, ``Table 1``."""
    labels = []
    for name in found:
        root, _, config = name.partition("/")
        folder, _, stem = config.rpartition("/")
        label = folder if folder and stem in ("metamask_barlow", "icl_msr_simclr") else config
        if root == "study":
            label = re.sub(r"^(?:metamask|icl_msr)_(table|fig)(?=\d)", _titled, config)
        labels.append(f"probe {label}" if root == "linear" else label)
    return ", ".join(labels)


def _titled(found: re.Match[str]) -> str:
    return {"table": "Table ", "fig": "Fig. "}[found[1]]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page, or with ``--check`` compares it.

    Raises:
        SystemExit: where the page is another.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, fail where the page is another")
    if not parser.parse_args(argv).check:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        raise SystemExit(f"error: {PAGE.name} must be what the configs compose, got another: make settings")


if __name__ == "__main__":
    main()
