"""A composed config, held against its model, before anything heavy is imported."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.paths import expand_paths
from metamask_plugin.config import linear, pretraining
from metamask_plugin.config.methods import METHOD_KWARGS, Baseline, TaskKwargs
from metamask_plugin.config.read import Node, keys_of, read
from metamask_plugin.config.solo_learn import SOLO_LEARN, WITHOUT_EFFECT
from metamask_plugin.errors import UserError, check
from metamask_plugin.renamed import VALUES, with_new_names

METHOD_KEYS = [
    *keys_of(Baseline, "method_kwargs."),
    *keys_of(TaskKwargs, "method_kwargs.task_kwargs."),
]
"""Keys that a slip may put at the top of a config."""


def checked_pretraining(cfg: DictConfig, quiet: bool = False) -> Node:
    """The pretraining config, complete but for what a method and its preset fill in.

    Args:
        cfg: as composed; it stays as it is.
        quiet: whether keys without effect, and old names, are passed over in silence.

    Raises:
        UserError: for an unknown or missing key, a value that cannot be, or values that cannot be together.
    """
    node, aside = _split(cfg, WITHOUT_EFFECT)
    with_new_names(node, _typed(), quiet)
    found = read(pretraining.Pretraining, node, also=METHOD_KEYS)
    own = METHOD_KWARGS.get(found["method"])
    if own is not None:
        found["method_kwargs"] = read(own, found["method_kwargs"], "method_kwargs")
    asked = [key for key, value in aside.items() if value and value != SOLO_LEARN.get(key)]
    if asked and not quiet:
        print(f"note: {', '.join(asked)}: solo-learn's, without effect here", file=sys.stderr)
    for key, value in aside.items():
        block, _, last = key.rpartition(".")
        (found.setdefault(block, {}) if block else found)[last] = value
    return found


def checked_linear(cfg: DictConfig) -> Node:
    """The config of a probe or of fine-tuning, complete.

    Args:
        cfg: as composed; it stays as it is.

    Raises:
        UserError: for an unknown key, or a value that cannot be.
    """
    node, _ = _split(cfg, linear.WITHOUT_EFFECT)
    if node.get("pretrained_feature_extractor") in ("", "None"):  # solo-learn's YAMLs write None, a word
        node["pretrained_feature_extractor"] = None
    return read(linear.Linear, node)


def _split(cfg: DictConfig, keys: Iterable[str]) -> tuple[Node, Node]:
    """Without some keys, as plain dictionaries and lists; and these keys, dotted, with their values."""
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    expand_paths(cfg)
    node, aside = plain(cfg), {}
    for key in keys:
        block, _, last = key.rpartition(".")
        inner = node.get(block) if block else node
        if isinstance(inner, dict) and last in inner:
            aside[key] = inner.pop(last)
        if block and block in node and node[block] in (None, {}):
            del node[block]
    return node, aside


def _typed() -> set[str]:
    """Keys on the command line that Hydra has read."""
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return {word.lstrip("+").partition("=")[0] for word in words}


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The config with its interpolations resolved, as plain dictionaries and lists.

    Raises:
        UserError: for a ``???`` that is not filled in, or an interpolation that leads nowhere.
    """
    try:
        return OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key or 'a key'} must be set, got ???; set it on the command line"
        ) from None
    except InterpolationResolutionError as error:
        reason = _first_line(error)
        raise UserError(
            f"{error.full_key or 'the config'} must be an interpolation that resolves, got: {reason}; name a "
            "key that is there, or write the value itself"
        ) from None
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(
            f"the config must resolve, got {type(error).__name__}: {_first_line(error)}"
        ) from None
    except RecursionError:
        raise UserError("the config must resolve, got an interpolation that refers to itself") from None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def frozen(node: Mapping[str, Any]) -> DictConfig:
    """A config that is not to be changed any more."""
    cfg = OmegaConf.create(dict(node))
    OmegaConf.set_readonly(cfg, True)
    return cfg


def changed(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    """A frozen copy with another value.

    Args:
        cfg: a frozen config.
        key: dotted.
        value: of the copy.
    """
    copy = cfg.copy()
    OmegaConf.set_readonly(copy, False)
    OmegaConf.update(copy, key, value, force_add=True)
    OmegaConf.set_readonly(copy, True)
    return copy


def methods_of(ablation: str) -> list[str]:
    """Names of the methods that a file of ``scripts/pretrain/ablation`` can be laid over."""
    node = OmegaConf.to_container(OmegaConf.load(SCRIPTS / "pretrain" / "ablation" / f"{ablation}.yaml"))
    if isinstance(node.get("method"), str):
        return [name for name in METHOD_KWARGS if name != "supervised"]
    keys = list(_keys(node.get("method_kwargs") or {}))
    fitting = [
        name
        for name, known in METHOD_KWARGS.items()
        if name not in ("baseline", "supervised") and all(_is_known(key, keys_of(known)) for key in keys)
    ]
    return fitting or ["baseline"]


def check_ablation(cfg: DictConfig) -> None:
    """Raises a UserError where the ablation on the command line is of another method than the config."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    ablation = choices.get("ablation")
    method = VALUES["method"].get(cfg.get("method"), cfg.get("method"))
    if ablation in (None, "none", "null") or method not in METHOD_KWARGS:
        return
    methods = methods_of(ablation)
    fits = method in methods or method in ("baseline", "supervised")
    check(fits, "ablation", f"one of {method}", ablation, f"it is of {' and '.join(methods)}")


def _keys(node: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{within}{key}.")
        else:
            yield f"{within}{key}"


def _is_known(key: str, known: Sequence[str]) -> bool:
    block = any(other.startswith(f"{key}.") for other in known)
    return block or any(key == other or key.startswith(f"{other}.") for other in known)
