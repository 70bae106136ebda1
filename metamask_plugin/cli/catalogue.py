"""``metamask-ssl list``: what a command line can name, read from the registries and the configs.

Only the sections that are read from registries import torch.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.known import names_of, shipped
from metamask_plugin.cli.parsers import SECTIONS

PRETRAIN = SCRIPTS / "pretrain"
METHODS_SHOWN = ("bare", "metamask", "icl_msr", "supervised")


def catalogue(section: str | None = None) -> str:
    """Names, what they are, and how each is written on a command line, as text.

    Args:
        section: one of :data:`~metamask_plugin.cli.parsers.SECTIONS`; None for all but the studies.
    """
    wanted = SECTIONS[:-1] if section is None else (section,)
    return "\n\n".join(text for name in wanted for text in SHOWN[name]())


def _section(title: str, how: str, rows: Iterable[Sequence[str]]) -> str:
    return f"{title}  ({how})\n{_columns(rows)}"


def _configs() -> list[str]:
    return [
        _section(
            f"{kind} configs",
            f"metamask-ssl {kind} --config-name <name>",
            _comments(SCRIPTS / kind, shipped(kind)),
        )
        for kind in ("pretrain", "linear")
    ]


def _of_studies() -> list[str]:
    from metamask_plugin.cli.study import catalogue as studies

    return [studies()]


def _of_tasks() -> list[str]:
    from metamask_plugin.host.solo_settings import SETTINGS, WITH_MSR

    solo = [(name, "MetaMask, ICL-MSR" if name in WITH_MSR else "MetaMask", "") for name in sorted(SETTINGS)]
    return [
        _section("tasks", "task=<name>, or method_kwargs.task=<name>", _tasks()),
        _section(
            "solo-learn's methods as tasks", "method_kwargs.task=solo:<name>, where it is installed", solo
        ),
    ]


def _of_methods() -> list[str]:
    return [_section("methods", "method=<name>", _methods(PRETRAIN))]


def _of_encoders() -> list[str]:
    from metamask_plugin.modules.encoders import ENCODERS

    return [
        _section(
            "encoders", "backbone.name=<name>", [*_described(ENCODERS), ("...", "any model of timm's", "")]
        )
    ]


def _of_datasets() -> list[str]:
    from metamask_plugin.data.registry import ABOUT, DATASETS

    return [_section("data sets", "data.dataset=<name>", [(name, ABOUT[name], "") for name in DATASETS])]


def _of_estimators() -> list[str]:
    from metamask_plugin.bilevel import ESTIMATORS

    return [_section("estimators", "method_kwargs.meta.estimator=<name>", _described(ESTIMATORS))]


def _of_ablations() -> list[str]:
    from metamask_plugin.cli.ablations import methods_of

    names = names_of("ablation")
    rows = [
        (name, about, f"of {', '.join(methods_of(name))}")
        for name, about, _ in _comments(PRETRAIN / "ablation", names)
    ]
    return [_section("ablations", "ablation=<name>", rows)]


def _of_settings() -> list[str]:
    names = names_of("setting")
    return [_section("settings", "setting=<name>", _comments(PRETRAIN / "setting", names))]


SHOWN: dict[str, Callable[[], list[str]]] = {
    "configs": _configs,
    "tasks": _of_tasks,
    "methods": _of_methods,
    "encoders": _of_encoders,
    "datasets": _of_datasets,
    "estimators": _of_estimators,
    "ablations": _of_ablations,
    "settings": _of_settings,
    "studies": _of_studies,
}


def _tasks() -> list[Sequence[str]]:
    from metamask_plugin.tasks import TASKS, Task

    rows = []
    for name, task in TASKS.items():
        msr = task.backdoor_adjusted_loss is not Task.backdoor_adjusted_loss
        rows.append((name, task.source, f"negatives: {task.negatives}" + ("" if msr else "; no MSR")))
    return rows


def _methods(scripts: Path) -> list[Sequence[str]]:
    from metamask_plugin.methods import METHODS

    configs = {path.relative_to(scripts).with_suffix("").as_posix(): path for path in scripts.rglob("*.yaml")}
    rows = []
    for name in METHODS_SHOWN:
        named = sorted(
            config for config, path in configs.items() if f"\nmethod: {name}\n" in path.read_text()
        )
        rows.append((name, _paper(METHODS[name]), ", ".join(named) or "any config of the others"))
    return rows


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
