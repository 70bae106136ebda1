"""A composed config, held against its model, before anything heavy is imported."""

import sys
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_plugin.cli.paths import expand_paths
from metamask_plugin.cli.resolved import plain
from metamask_plugin.config.linear import Linear
from metamask_plugin.config.methods import METHOD_KWARGS, Baseline, TaskKwargs
from metamask_plugin.config.pretraining import LIGHTNING, Pretraining
from metamask_plugin.config.read import keys_of, read, unused_keys, without_nulls

METHOD_KEYS = [
    *keys_of(Baseline, "method_kwargs."),
    *keys_of(TaskKwargs, "method_kwargs.task_kwargs."),
]
"""Keys that a slip may put at the top of a config."""


def checked_pretraining(cfg: DictConfig, quiet: bool = False) -> dict[str, Any]:
    """The pretraining config, complete but for what a method and its preset fill in.

    Args:
        cfg: as composed; it stays as it is.
        quiet: whether keys without effect are passed over in silence.

    Raises:
        UserError: for an unknown or missing key, a value that cannot be, or values that cannot be together.
    """
    node = _plain(cfg)
    others = [key for key in LIGHTNING if node.pop(key, None) is not None]
    found = read(Pretraining, node, also=METHOD_KEYS)
    own = METHOD_KWARGS.get(found["method"])
    if own is not None:
        kwargs = read(own, found["method_kwargs"], "method_kwargs")
        found["method_kwargs"] = without_nulls(own, kwargs)
    ignored = [*unused_keys(Pretraining, found), *others]
    if ignored and not quiet:
        print(f"note: {', '.join(ignored)}: solo-learn's, without effect here", file=sys.stderr)
    return found


def checked_linear(cfg: DictConfig) -> dict[str, Any]:
    """The config of a probe or of fine-tuning, complete.

    Args:
        cfg: as composed; it stays as it is.

    Raises:
        UserError: for an unknown key, or a value that cannot be.
    """
    node = _plain(cfg)
    if node.get("pretrained_feature_extractor") in ("", "None"):  # solo-learn's YAMLs write None, a word
        node["pretrained_feature_extractor"] = None
    for key in LIGHTNING:
        node.pop(key, None)
    return read(Linear, node)


def _plain(cfg: DictConfig) -> dict[str, Any]:
    cfg = cfg.copy()
    OmegaConf.set_readonly(cfg, False)
    OmegaConf.set_struct(cfg, False)
    cfg.pop("hydra", None)
    expand_paths(cfg)
    return plain(cfg)


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
