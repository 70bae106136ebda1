"""Defaults of ``method_kwargs``: one set from the paper, one from the authors' release."""

from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_plugin.errors import choose

FREE_FORM = ("task_kwargs", "estimator_kwargs", "kwargs")
"""Blocks whose keys belong to the object they are passed to, and are checked there."""

CHOICES = {
    "task": "task_kwargs",
    "meta.estimator": "meta.estimator_kwargs",
    "regularizer.name": "regularizer.kwargs",
}
"""Where the user makes another choice than the preset, the preset's settings for its own one go."""


def apply_preset(presets: dict[str, dict[str, Any]], user: DictConfig) -> DictConfig:
    """Lays the user's ``method_kwargs`` over the preset that they name (``preset``, default paper).

    Args:
        presets: defaults by preset name.
        user: ``method_kwargs`` as written in the config; null stands for the preset's, or for the default of
            what kwargs are passed to.

    Returns:
        The complete ``method_kwargs``.

    Raises:
        UserError: for an unknown preset or key.
    """
    name = choose("method_kwargs.preset", user.get("preset") or "paper", presets)
    defaults = OmegaConf.create({"preset": name, **presets[name]})
    user = OmegaConf.create(without_nulls(OmegaConf.to_container(user)))
    _check_keys(defaults, user, "method_kwargs")
    for choice, settings in CHOICES.items():
        own = OmegaConf.select(defaults, choice)
        if OmegaConf.select(user, choice, default=own) != own:
            OmegaConf.update(defaults, settings, {}, merge=False)
    return OmegaConf.merge(defaults, user)


def without_nulls(node: dict[str, Any]) -> dict[str, Any]:
    """A block of a config without its null entries, block by block: null stands for the default."""
    return {
        key: without_nulls(value) if isinstance(value, dict) else value
        for key, value in node.items()
        if value is not None
    }


def _check_keys(known: DictConfig, given: DictConfig, path: str) -> None:
    for key, value in given.items():
        choose(f"a key of {path}", key, known)
        if isinstance(value, DictConfig) and key not in FREE_FORM:
            _check_keys(known[key], value, f"{path}.{key}")
