"""Writes docs/settings.md: what the papers say of each setting, and what the configs and studies compose.

    python tools/settings_page.py [--check]    # or only says whether the page is as it would be written

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
from metamask_plugin.cli.config import for_method
from metamask_plugin.cli.known import shipped
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import with_defaults
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

COUNTED = {"num_large_crops": 2, "num_small_crops": 0}
"""Of ``data``: so that the learning rates are shown as a config gives them, for a batch of 256."""

SHORT = {
    "^(pretrain|study)/": "",
    "^linear/": "probe ",
    "/(metamask_barlow|icl_msr_simclr)$": "",
    r"^(metamask|icl_msr)_table(?=\d)": "Table ",
    r"^(metamask|icl_msr)_fig(?=\d)": "Fig. ",
}
"""What of a name the page leaves out."""

Node = Mapping[str, Any]


@cache
def names() -> list[str]:
    """Of every shipped pretraining config, probe and study: ``pretrain/cifar/metamask_barlow``."""
    others = [*(SCRIPTS / "linear").rglob("*.yaml"), *(SCRIPTS / "study").glob("*.yaml")]
    found = sorted(path.relative_to(SCRIPTS).with_suffix("").as_posix() for path in others)
    return [
        *(f"pretrain/{name}" for name in shipped("pretrain")),
        *(n for n in found if not n.endswith("/base")),
    ]


def source() -> tuple[str, list[dict[str, Any]]]:
    """The introduction and the groups; statements take over what their group says, ``own`` is as written."""
    written = OmegaConf.to_container(OmegaConf.load(SOURCE))
    for group in written["groups"]:
        where, common = group.get("where", {}), {"of": group["of"], "with": group.get("with", ())}
        group["statements"] = [
            {**common, **own, "where": where | own.get("where", {}), "own": own}
            for own in group["statements"]
        ]
    return written["introduction"], written["groups"]


def matching(patterns: Sequence[str]) -> list[str]:
    """The names that a statement is about."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names()):
            raise UserError(f"of must match a config or a study, got {pattern!r}")
    return [name for name in names() if any(fnmatchcase(name, pattern) for pattern in patterns)]


def values(statement: Node) -> dict[str, list[Any]]:
    """The different values of a statement's key, by name of the config or study."""
    found: dict[str, list[Any]] = {}
    for name in matching(statement["of"]):
        for node in _nodes(name, tuple(statement["with"]), statement["where"]):
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
    if root != "study":
        yield _composed(root, config, overrides)
        return
    study = _study(config)
    factors = {
        name: [*dict.fromkeys(trial.factors[name] for trial in study.trials)] for name in study.factors
    }
    measures = {name: _defaults(MEASURES[name]) | dict(given) for name, given in study.measures.items()}
    protocol = next((given["protocol"] for given in measures.values() if given.get("protocol")), None)
    measured = {
        "factors": factors,
        "measures": measures,
        "probe": asdict(PROTOCOLS[protocol]) if protocol else {},
        "reference": sorted({row["metric"] for row in study.paper}),
        "votes_of_5": vote_temperature(5, measures.get("accuracy", {}).get("temperature")),
    }
    for trial in _trials(study, where):
        yield {**_composed_trial(config, trial.index), **measured}


def _trials(study: Study, where: Node) -> list[Trial]:
    """Those of the levels asked for that differ from the first of them in one factor at most."""

    def asked(trial: Trial) -> bool:
        levels = (
            (str(trial.factors[name]), wanted) for name, wanted in where.items() if name in trial.factors
        )
        return all(any(fnmatchcase(level, str(pattern)) for pattern in wanted) for level, wanted in levels)

    found = [trial for trial in study.trials if trial.seed == study.seeds[0] and asked(trial)]
    if not found:
        raise UserError(f"where must match a trial of {study.name}, got {where}")
    first = found[0].factors
    return [trial for trial in found if sum(trial.factors[name] != first[name] for name in first) <= 1]


@cache
def _study(name: str) -> Study:
    with initialize_config_dir(str((SCRIPTS / "study").resolve()), version_base="1.2"):
        return study_of(compose(name))


@cache
def _composed_trial(study: str, index: int) -> Node:
    return _completed(pretraining_config(_study(study), _study(study).trials[index]))


@cache
def _composed(root: str, config: str, overrides: tuple[str, ...]) -> Node:
    with initialize_config_dir(str((SCRIPTS / root).resolve()), version_base="1.2"):
        cfg = compose(config, list(overrides))
    if root == "pretrain":
        return _completed(cfg)
    protocol = PROTOCOLS.get(cfg.protocol)  # of another one the optimizer block is the protocol
    return {**OmegaConf.to_container(cfg), "probe": asdict(protocol) if protocol else {}}


def _completed(cfg: DictConfig) -> Node:
    """With the defaults of the package, of the method and of the task."""
    complete = with_defaults(Pretraining, OmegaConf.to_container(cfg, resolve=True))
    complete["data"] |= COUNTED
    own = METHODS[cfg.method].add_and_assert_specific_cfg(for_method(OmegaConf.create(complete)))
    node = OmegaConf.to_container(own)
    kwargs = node["method_kwargs"]
    if kwargs.get("task") in TASKS:
        kwargs["task_kwargs"] = _defaults(TASKS[kwargs["task"]]) | kwargs["task_kwargs"]
    return node


def _defaults(function: Any) -> dict[str, Any]:
    parameters = signature(function).parameters.values()
    found = {entry.name: entry.default for entry in parameters if entry.default is not Parameter.empty}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _evaluated(node: Node, key: str, name: str) -> Any:
    """A key's value; ``a.{b, c}`` is a list, ``a.b * a.c / 256`` a number."""
    if several := re.fullmatch(r"(.*)\{(.*)\}", key):
        return [_evaluated(node, several[1] + part, name) for part in several[2].split(", ")]
    first, *rest = re.split(r" ([*/]) ", key)
    value = _read(node, first, name)
    for operator, operand in zip(rest[::2], rest[1::2]):
        by = float(operand) if operand.isdigit() else _read(node, operand, name)
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
    introduction, groups = source()
    deviations = ["deviation" in statement for group in groups for statement in group["statements"]]
    lines = [introduction.format(len(deviations), sum(deviations))]
    for group in groups:
        lines += [f"## {group['title']}", "", f"{group['about']} For: {_labels(group['of'])}.", ""]
        lines += ["| § | the paper | for | key | paper | here | why |", "|---|---|---|---|---|---|---|"]
        lines += [*map(_row, group["statements"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _row(statement: Node) -> str:
    own, key = statement["own"], statement.get("key")
    narrower = [_labels(own["of"])] if "of" in own else []
    narrower += [f"`{override}`" for override in own.get("with", ())]
    narrower += [
        f"{factor}: {', '.join(map(str, levels))}" for factor, levels in own.get("where", {}).items()
    ]
    here = _here(values(statement)) if key else statement["here"]
    cells = (
        statement["section"],
        "–" if statement["sentence"] == "-" else f"“{statement['sentence']}”",
        "; ".join(narrower),
        f"`{key}`" if key else "–",
        "–" if statement["value"] is None else _text(statement["value"]),
        f"**{here}**" if "deviation" in statement else here,
        next((statement[kind] for kind in ("deviation", "chosen", "note") if kind in statement), ""),
    )
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


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
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _labels(patterns: Sequence[str]) -> str:
    """Short names: ``cifar, probe cifar, Table 1``."""
    found = matching(patterns)
    for pattern, replacement in SHORT.items():
        found = [re.sub(pattern, replacement, name) for name in found]
    return ", ".join(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Writes the page, or with ``--check`` fails where it is another."""
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
