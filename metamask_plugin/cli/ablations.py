"""Which methods an ablation is of: those that have every key that it sets."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.config.methods import METHOD_KWARGS
from metamask_plugin.config.read import keys_of
from metamask_plugin.errors import check


def methods_of(ablation: str) -> list[str]:
    """Names of the methods that a file of ``scripts/pretrain/ablation`` can be laid over."""
    node = OmegaConf.to_container(OmegaConf.load(SCRIPTS / "pretrain" / "ablation" / f"{ablation}.yaml"))
    if isinstance(node.get("method"), str):
        return [name for name in METHOD_KWARGS if name != "supervised"]
    keys = list(_keys(node.get("method_kwargs") or {}))
    fitting = [
        name
        for name, known in METHOD_KWARGS.items()
        if name not in ("bare", "supervised") and all(_is_known(key, keys_of(known)) for key in keys)
    ]
    return fitting or ["bare"]


def check_ablation(cfg: DictConfig) -> None:
    """Raises a UserError where the ablation on the command line is of another method than the config."""
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    ablation = choices.get("ablation")
    if ablation in (None, "none", "null") or cfg.get("method") not in METHOD_KWARGS:
        return
    methods = methods_of(ablation)
    fits = cfg.method in methods or cfg.method in ("bare", "supervised")
    check(fits, "ablation", f"one of {cfg.method}", ablation, f"it is of {' and '.join(methods)}")


def _keys(node: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Mapping) and value:
            yield from _keys(value, f"{within}{key}.")
        else:
            yield f"{within}{key}"


def _is_known(key: str, known: Sequence[str]) -> bool:
    block = any(other.startswith(f"{key}.") for other in known)
    return block or any(key == other or key.startswith(f"{other}.") for other in known)
