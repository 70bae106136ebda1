"""The levels of a study's factors: the study's own, or the user's, who must name what they change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.errors import check, nearest

RESERVED = ("seed", "checkpoint", "metric", "value")
"""Columns of the results that no factor may be called."""

CHANGES = ("overrides", "config", "epochs", "checkpoint")
"""Keys of a level that say what it changes."""

Node = Mapping[str, Any]


@dataclass(frozen=True)
class Level:
    """One value of a factor, and what it changes.

    Attributes:
        value: what stands in the results: the label, or the number where the factor is one.
        overrides: of the pretraining config, as on its command line.
        config: the pretraining config, where it is another than the study's.
        epochs: factor on the config's ``max_epochs``: how much longer this level trains than the others.
        checkpoint: an encoder that is there already, in place of a pretraining.
        bare: whether it is a mere value of the user's, which acts through a placeholder or not at all.
    """

    value: str | int | float
    overrides: tuple[str, ...] = ()
    config: str | None = None
    epochs: float = 1.0
    checkpoint: str | None = None
    bare: bool = False


def levels_of(node: Node, size: Node) -> dict[str, list[Level]]:
    """The levels by factor: the user's, else those of this size, else those of the paper.

    A mere label of the study's stands for its level of that name.

    Args:
        node: the resolved study config.
        size: what its size changes.

    Raises:
        UserError: for what is no level, a level of the user's that changes nothing, and an override behind
            ``--`` that makes all labels of a factor wrong.
    """
    factors_shipped = shipped(node, "factors")
    factors, labels = {}, {}
    for name, given in node["factors"].items():
        reduced = (size.get("factors") or {}).get(name)
        known = _known(factors_shipped.get(name), reduced)
        factors[name] = _levels(name, given, size, node, factors_shipped.get(name, given), known)
        labels[name] = [str(label) for label in known]
    common = [*(node.get("settings") or ()), *(size.get("settings") or ())]
    user = node.get("overrides") or ()
    _check_bare_levels(factors, labels, [*common, *user])
    _check_user_overrides(factors, common, user)
    return factors


def _levels(name: str, given: Any, size: Node, node: Node, own: Any, known: Node) -> list[Level]:
    check(name not in RESERVED, "factors", f"named other than {', '.join(RESERVED)}", name)
    if name == "encoder" and node.get("checkpoint"):
        paths = node["checkpoint"] if isinstance(node["checkpoint"], list) else [node["checkpoint"]]
        return [Level(_short(path), checkpoint=path) for path in paths]
    users = given != own
    if not users:
        given = (size.get("factors") or {}).get(name, given)
    expected = "a list of levels like {label: mine, overrides: ['key=value']}"
    check(isinstance(given, list) and len(given) > 0, f"factors.{name}", expected, given)
    most = len(given) if users else size.get("levels") or len(given)
    levels = []
    for entry in [*given[:most], *given[most:][-1:]]:
        if not isinstance(entry, Mapping):
            entry = known[entry] if _hashable(entry) and entry in known else {"value": entry}
        unknown = set(entry) - {"label", "value", *CHANGES}
        check(not unknown, f"factors.{name}", expected, entry, f"unknown: {', '.join(sorted(unknown))}")
        value = _label(entry)
        check(value is not None and _hashable(value), f"factors.{name}", expected, entry)
        bare = users and value not in known and not any(key in entry for key in CHANGES)
        changes = {key: entry[key] for key in CHANGES if key in entry}
        changes["overrides"] = tuple(changes.get("overrides", ()))
        levels.append(Level(value, **changes, bare=bare))
    twice = [level.value for level in levels if sum(other.value == level.value for other in levels) > 1]
    check(not twice, f"factors.{name}", "levels with different labels", twice[:1])
    return levels


def _known(paper: Any, reduced: Any) -> dict[Any, Node]:
    """A factor's own levels by label: those of the size before those of the paper.

    Where the size has none of the paper's (other data, another encoder), the paper's are not there.
    """
    full, own = ({_label(entry): entry for entry in entries or ()} for entries in (paper, reduced))
    if own.keys() & full.keys():
        # a size may name a level of the paper's by its label alone
        own = full | {label: entry for label, entry in own.items() if isinstance(entry, Mapping)}
    elif not own:
        own = full
    return {label: entry if isinstance(entry, Mapping) else {"value": entry} for label, entry in own.items()}


def _label(entry: Any) -> Any:
    return entry.get("value", entry.get("label")) if isinstance(entry, Mapping) else entry


def _hashable(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _check_bare_levels(
    factors: Mapping[str, Sequence[Level]], labels: Mapping[str, Sequence[str]], common: Sequence[Any]
) -> None:
    """Refuses a mere value that no placeholder takes: the results would name what no training had."""
    words = [*common, *(word for levels in factors.values() for level in levels for word in level.overrides)]
    for name, levels in factors.items():
        consumed = any(f"{{{name}}}" in str(word) for word in words)
        for level in levels:
            if consumed or not level.bare:
                continue
            hint = nearest(level.value, labels[name])
            own = f"name one of {', '.join(labels[name])}" + (f" (did you mean {hint!r}?)" if hint else "")
            mine = _as_typed(name, level.value, "key=value")
            remedy = f"{own}, or say what it changes, [] for nothing: {mine}"
            check(False, f"factors.{name}", "levels that change something", level.value, remedy)


def _check_user_overrides(
    factors: Mapping[str, Sequence[Level]], common: Sequence[str], user: Sequence[Any]
) -> None:
    """Refuses an override behind ``--`` of what every level of a factor sets: their labels would be wrong."""
    for name, levels in factors.items():
        placeholder = f"{{{name}}}"
        shared = [word for word in common if placeholder in word]
        set_by = [[_key(word) for word in [*level.overrides, *shared]] for level in levels]
        for word in user:
            key = _key(word)
            sets = [any(own == key or own.startswith(f"{key}.") for own in keys) for keys in set_by]
            check(
                not all(sets) or placeholder in str(word),
                "overrides (behind --)",
                f"of other keys than what every level of {name} sets",
                word,
                f"give it as a level: {_as_typed(name, 'mine', word)}",
            )


def _as_typed(name: str, label: Any, override: Any) -> str:
    """A level as a shell and Hydra's grammar take it."""
    return f"factors.{name}=\"[{{label: {label!r}, overrides: ['{override}']}}]\""


def _key(override: Any) -> str:
    """``++data.fraction=0.1`` and ``~data.fraction`` are both about ``data.fraction``."""
    return str(override).lstrip("+~").partition("=")[0].partition("@")[0]


def own_files(name: str) -> list[Path]:
    """The files of a shipped study: what it shares with others, then its own; none for another's study."""
    path = SCRIPTS / "study" / f"{name}.yaml"
    if not path.exists():
        return []
    shared = [
        str(entry).split("@")[0]
        for entry in OmegaConf.load(path).get("defaults", ())
        if "@_global_" in str(entry)
    ]
    return [*(path.parent / f"{name}.yaml" for name in shared), path]


def shipped(node: Node, key: str) -> Node:
    """A block as the study's own file has it, or what it shares with others: before the user's changes.

    Args:
        node: the resolved study config.
        key: the block, e.g. ``factors``.
    """
    blocks = [file[key] for file in map(OmegaConf.load, own_files(node["name"])) if key in file]
    if not blocks:
        return {}
    # their interpolations are of the study's other keys
    return OmegaConf.to_container(OmegaConf.create({**node, key: OmegaConf.merge(*blocks)}), resolve=True)[
        key
    ]


def _short(path: str) -> str:
    """A checkpoint's title: the end of its path."""
    return "/".join(str(path).rstrip("/").split("/")[-2:])
