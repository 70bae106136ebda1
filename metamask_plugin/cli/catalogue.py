"""``metamask-ssl list``: what a command line can name, read from the registries and the configs.

Only the sections that are read from registries import torch.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.checked import methods_of
from metamask_plugin.cli.known import names_of, shipped
from metamask_plugin.config.methods import METHOD_KWARGS

PRETRAIN = SCRIPTS / "pretrain"


def catalogue(section: str | None = None) -> str:
    """Names, what they are, and how each is written on a command line, as text.

    Args:
        section: one of :data:`~metamask_plugin.cli.parsers.SECTIONS`; None for all but the studies.
    """
    if section == "studies":
        from metamask_plugin.cli.study import catalogue as studies

        return studies()
    wanted = SHOWN if section is None else (section,)
    blocks = [block for name in wanted for block in SHOWN[name]]
    return "\n\n".join(f"{title}  ({how})\n{_columns(rows())}" for title, how, rows in blocks)


def _configs(kind: str) -> list[Sequence[str]]:
    return _comments(SCRIPTS / kind, shipped(kind))


def _tasks() -> list[Sequence[str]]:
    from metamask_plugin.tasks import TASKS

    return [(name, task.source, f"negatives: {task.negatives}") for name, task in TASKS.items()]


def _solo_tasks() -> list[Sequence[str]]:
    from metamask_plugin.host.solo_settings import SETTINGS, WITH_MSR

    return [(name, "MetaMask, ICL-MSR" if name in WITH_MSR else "MetaMask", "") for name in sorted(SETTINGS)]


def _methods() -> list[Sequence[str]]:
    from metamask_plugin.methods import METHODS

    configs = {
        path.relative_to(PRETRAIN).with_suffix("").as_posix(): path for path in PRETRAIN.rglob("*.yaml")
    }
    rows = []
    for name in METHOD_KWARGS:
        named = sorted(
            config for config, path in configs.items() if f"\nmethod: {name}\n" in path.read_text()
        )
        rows.append((name, _paper(METHODS[name]), ", ".join(named) or "any config of the others"))
    return rows


def _encoders() -> list[Sequence[str]]:
    from metamask_plugin.modules.encoders import ENCODERS

    return [*_described(ENCODERS), ("...", "any model of timm's", "")]


def _datasets() -> list[Sequence[str]]:
    from metamask_plugin.data.registry import ABOUT, DATASETS

    return [(name, ABOUT[name], "") for name in DATASETS]


def _estimators() -> list[Sequence[str]]:
    from metamask_plugin.bilevel import ESTIMATORS

    return _described(ESTIMATORS)


def _ablations() -> list[Sequence[str]]:
    found = _comments(PRETRAIN / "ablation", names_of("ablation"))
    return [(name, about, f"of {', '.join(methods_of(name))}") for name, about, _ in found]


def _described(registry: Mapping[str, Callable]) -> list[Sequence[str]]:
    return [(name, _summary(item), "") for name, item in registry.items()]


def _comments(folder: Path, names: Iterable[str]) -> list[Sequence[str]]:
    """The first comment of each config, behind Hydra's package line."""
    return [(name, _first_comment((folder / f"{name}.yaml").read_text()), "") for name in names]


def _first_comment(text: str) -> str:
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    return re.split(r"  Use:|\. Use:", comments[0])[0] if comments else ""


def _summary(item: Callable) -> str:
    return (inspect.getdoc(item) or "").split("\n")[0]


def _paper(item: type) -> str:
    """The reference [0] of a docstring, up to its title."""
    found = re.search(r"\[0\] (.+?)$", inspect.getdoc(item) or "", re.MULTILINE)
    return found.group(1).replace("*", "") if found else ""


def _columns(rows: Iterable[Sequence[str]]) -> str:
    rows = list(rows)
    widths = [max(len(row[column]) for row in rows) for column in range(2)]
    return "\n".join(f"  {row[0]:<{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]}".rstrip() for row in rows)


SHOWN: dict[str, list[tuple[str, str, Callable[[], list[Sequence[str]]]]]] = {
    "configs": [
        (
            f"{kind} configs",
            f"metamask-ssl {kind} --config-name <name>",
            partial(_configs, kind),
        )
        for kind in ("pretrain", "linear")
    ],
    "tasks": [
        ("tasks", "task=<name>, or method_kwargs.task=<name>", _tasks),
        ("solo-learn's methods as tasks", "method_kwargs.task=solo:<name>, where installed", _solo_tasks),
    ],
    "methods": [("methods", "method=<name>", _methods)],
    "encoders": [("encoders", "backbone.name=<name>", _encoders)],
    "datasets": [("data sets", "data.dataset=<name>", _datasets)],
    "estimators": [("estimators", "method_kwargs.meta.estimator=<name>", _estimators)],
    "ablations": [("ablations", "ablation=<name>", _ablations)],
    "settings": [
        ("settings", "setting=<name>", lambda: _comments(PRETRAIN / "setting", names_of("setting")))
    ],
}
"""By section: title, how it is written, and what makes the rows."""
