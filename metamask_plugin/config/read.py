"""Holds what a user wrote against a model, and fills in what it leaves to the defaults."""

import copy
from collections.abc import Iterable, Mapping
from types import UnionType
from typing import Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from metamask_plugin.config.messages import Node, as_line


def read(model: type[BaseModel], node: Mapping[str, Any], where: str = "", also: Iterable[str] = ()) -> Node:
    """Checks keys, values, and what values cannot be together.

    Args:
        model: what there may be.
        node: the config, or a block of it, plain.
        where: the block's own name; empty for the whole config.
        also: dotted names of keys of other blocks, for one that was put into the wrong one.

    Returns:
        The config, complete: a default where it is silent or null; given values are not converted.

    Raises:
        UserError: for the first fault, unknown keys before values.
    """
    try:
        model.model_validate(node)
    except ValidationError as error:
        # of a choice of kinds, what was nearly right
        order = {"extra_forbidden": 0, "refused": 1}
        faults = sorted(error.errors(include_url=False), key=lambda fault: order.get(fault["type"], 2))
        every = [*keys_of(model, f"{where}." if where else ""), *also]
        raise as_line(model, faults[0], where, every) from None
    return with_defaults(model, node)


def with_defaults(model: type[BaseModel], node: Mapping[str, Any] | None) -> Node:
    """A copy with the model's default for each key that is missing or null, block by block."""
    found = dict(node or {})
    for name, field in model.model_fields.items():
        if _is_model(field.annotation):
            found[name] = with_defaults(field.annotation, found.get(name))
        elif found.get(name) is None and not field.is_required():
            found[name] = copy.copy(field.default)
    return found


def block_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a block of keys; None for any other kind of value."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return next((kind for kind in kinds if _is_model(kind)), None)


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    # Python 3.10 takes dict[str, Any] for a class
    return get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel)


def keys_of(model: type[BaseModel], within: str = "") -> list[str]:
    """Dotted names of all keys, those of blocks in their place.

    Args:
        model: of a config.
        within: put before each.
    """
    found = []
    for name, field in model.model_fields.items():
        inner = block_of(field.annotation)
        if inner is not None:
            found += keys_of(inner, f"{within}{name}.")
        else:
            found.append(within + name)
    return found
