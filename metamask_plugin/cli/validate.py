"""Holds a config against a schema, before anything else is done with it."""

from collections.abc import Iterable, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from metamask_plugin.cli.settings import Setting, check_finite, check_value
from metamask_plugin.errors import UserError, check, nearest, shown


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


def without_empty_blocks(cfg: DictConfig, blocks: Iterable[str]) -> None:
    """Takes out, in place, blocks that are null: whose keys are all left to their defaults.

    Args:
        cfg: the config.
        blocks: dotted names of the schema's blocks, outer ones first.
    """
    for name in blocks:
        parent, _, key = name.rpartition(".")
        node = OmegaConf.select(cfg, parent, throw_on_resolution_failure=False) if parent else cfg
        if not isinstance(node, DictConfig) or key not in node or OmegaConf.is_missing(node, key):
            continue
        if not OmegaConf.is_interpolation(node, key) and node.get(key) is None:
            node.pop(key)


def blocks_of(schema: Mapping[str, Setting]) -> list[str]:
    """Dotted names of all blocks that the schema's keys lie in, outer ones first."""
    names = {".".join(key.split(".")[:depth]) for key in schema for depth in range(1, key.count(".") + 1)}
    return sorted(names, key=lambda name: name.count("."))


def validate(
    node: Mapping[str, Any], schema: Mapping[str, Setting], where: str = "", elsewhere: Iterable[str] = ()
) -> None:
    """Checks keys and values.

    Args:
        node: the config, or a block of it, plain.
        schema: what it may hold, by dotted key within ``node``.
        where: the block's own name; empty for the whole config.
        elsewhere: dotted names of keys in other blocks, for one that was put into the wrong one.

    Raises:
        UserError: for an unknown key, with the nearest known one; for a value that does not fit.
    """
    _check_keys(node, schema, where, "", elsewhere)
    for key, setting in schema.items():
        value, found = _lookup(node, key)
        if found:
            name = f"{where}.{key}" if where else key
            check_value(name, value, setting)
            check_finite(name, value)


def unknown_key(where: str, key: Any, known: Iterable[str], schema: Iterable[str] = ()) -> UserError:
    """What is said of a key that there is none of: the ones that there are, and the nearest.

    Args:
        where: the block that it was found in, as the user writes it; empty for the whole config.
        key: the key.
        known: the block's keys.
        schema: dotted names of all keys, for one that was put into the wrong block.
    """
    known = sorted(known)
    block = where or "the config"
    hint = nearest(key, known)
    if hint is None:
        elsewhere = sorted((full for full in schema if full.rpartition(".")[2] == str(key)), key=len)
        hint = elsewhere[0] if elsewhere else nearest(key, schema)
    remedy = f"did you mean {hint!r}?" if hint else f"take it out of {block}"
    return UserError(f"a key of {block} must be one of {', '.join(known)}, got {shown(key)}; {remedy}")


def _check_keys(
    node: Mapping[str, Any],
    schema: Mapping[str, Setting],
    where: str,
    inside: str,
    elsewhere: Iterable[str] = (),
) -> None:
    """Refuses unknown keys of a block, then of the blocks in it."""
    depth = inside.count(".") + 1 if inside else 0
    known: dict[str, bool] = {}
    named = set()
    for full, setting in schema.items():
        if not inside or full.startswith(f"{inside}."):
            parts = full.split(".")
            known[parts[depth]] = known.get(parts[depth], False) or len(parts) > depth + 1
            named |= set() if setting.unused else {parts[depth]}
    block = ".".join(part for part in (where, inside) if part)
    for key, value in node.items():
        if key not in known:
            raise unknown_key(block, key, named, [*known, *schema, *elsewhere])
        if known[key]:
            name = f"{block}.{key}" if block else key
            check(isinstance(value, Mapping), name, "a block of keys", value)
            _check_keys(value, schema, where, f"{inside}.{key}" if inside else key)


def _lookup(node: Any, key: str) -> tuple[Any, bool]:
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return None, False
        node = node[part]
    return node, True


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
