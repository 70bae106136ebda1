"""Expands ``~`` and ``$HOME`` in settings, as a shell does on its command line."""

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from metamask_plugin.errors import UserError, check, nearest


def expand_paths(cfg: DictConfig | ListConfig, where: str = "") -> None:
    """Expands, in place, every text of a config that begins with ``~`` or an environment variable.

    No setting but a path begins so.

    Args:
        cfg: the config, or a block or list of it.
        where: its name; empty for the whole config.

    Raises:
        UserError: ``~`` is followed by the name of no user.
    """
    keys = range(len(cfg)) if isinstance(cfg, ListConfig) else list(cfg)
    for key in keys:
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        value, name = cfg[key], f"{where}.{key}".lstrip(".")
        if isinstance(value, DictConfig | ListConfig):
            expand_paths(value, name)
        elif expanded(value, name) != value:
            cfg[key] = expanded(value, name)


def expanded(value: Any, name: str) -> Any:
    """A path with ``~`` and environment variables expanded; any other value as it is."""
    if not isinstance(value, str) or not value.startswith(("~", "$")):
        return value
    found = os.path.expanduser(os.path.expandvars(value))
    check(
        not found.startswith("~"), name, "a path in a user's folder", value, "write ./~ for a folder's name"
    )
    return found


def made_folder(flag: str, folder: Path) -> Path:
    """A folder for results, made before hours are spent on them.

    Raises:
        UserError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{flag} must be a folder that can be written, got {str(folder)!r} ({error.strerror}); "
            f"give another {flag}"
        ) from error
    return folder


def near_path(path: Path) -> str:
    """What is there of a path that is not."""
    there = next(parent for parent in (*path.parents, Path()) if parent.exists())
    missing = path.relative_to(there).parts[0] if path.is_absolute() == there.is_absolute() else path.name
    hint = nearest(missing, [entry.name for entry in there.iterdir()]) if there.is_dir() else None
    return f"did you mean {str(there / hint)!r}?" if hint else f"{str(there)!r} has no {missing!r}"
