"""``main_pretrain.py --list``: everything that a config can name, read from the registries."""

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from metamask_plugin.bilevel import ESTIMATORS
from metamask_plugin.data.registry import ABOUT, DATASETS
from metamask_plugin.host.solo_settings import SETTINGS, WITH_MSR
from metamask_plugin.methods import METHODS
from metamask_plugin.modules.encoders import ENCODERS
from metamask_plugin.tasks import TASKS, Task

OURS = ("bare", "metamask", "icl_msr", "supervised")


def catalogue(scripts: Path) -> str:
    """Tasks, methods, encoders, data sets and estimators, with their papers and configs, as text.

    Args:
        scripts: the folder of the pretraining configs.
    """
    sections = (
        ("tasks", "task=<name>, or method_kwargs.task=<name>", _tasks()),
        ("solo-learn's methods as tasks", "method_kwargs.task=solo:<name>", _solo_tasks()),
        ("methods", "method=<name>", _methods(scripts)),
        ("encoders", "backbone.name=<name>", [*_encoders(), ("...", "any model of timm's", "")]),
        ("data sets", "data.dataset=<name>", [(name, ABOUT[name], "") for name in DATASETS]),
        ("estimators", "method_kwargs.meta.estimator=<name>", _described(ESTIMATORS)),
        ("ablations", "ablation=<name>", _comments(scripts / "ablation")),
        ("settings", "setting=<name>", _comments(scripts / "setting")),
    )
    return "\n\n".join(f"{title}  ({how})\n{_columns(rows)}" for title, how, rows in sections)


def _tasks() -> list[Sequence[str]]:
    rows = []
    for name, task in TASKS.items():
        msr = task.backdoor_adjusted_loss is not Task.backdoor_adjusted_loss
        rows.append((name, task.source, f"negatives: {task.negatives}" + ("" if msr else "; no MSR")))
    return rows


def _solo_tasks() -> list[Sequence[str]]:
    return [(name, "MetaMask, ICL-MSR" if name in WITH_MSR else "MetaMask", "") for name in sorted(SETTINGS)]


def _methods(scripts: Path) -> list[Sequence[str]]:
    configs = {path.relative_to(scripts).with_suffix("").as_posix(): path for path in scripts.rglob("*.yaml")}
    rows = []
    for name in OURS:
        named = sorted(
            config for config, path in configs.items() if f"\nmethod: {name}\n" in path.read_text()
        )
        rows.append((name, _paper(METHODS[name]), ", ".join(named) or "any config of the others"))
    return rows


def _encoders() -> list[Sequence[str]]:
    return [(name, _summary(build), "") for name, build in ENCODERS.items()]


def _described(registry: dict[str, type]) -> list[Sequence[str]]:
    return [(name, _summary(item), "") for name, item in registry.items()]


def _comments(folder: Path) -> list[Sequence[str]]:
    """The first comment of each file, behind Hydra's package line."""
    return [(path.stem, _first_comment(path.read_text()), "") for path in sorted(folder.glob("*.yaml"))]


def _first_comment(text: str) -> str:
    comments = [line[2:] for line in text.splitlines() if line.startswith("# ") and "@package" not in line]
    return re.split(r"  Use:|\. Use:|: ", comments[0])[0] if comments else ""


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
