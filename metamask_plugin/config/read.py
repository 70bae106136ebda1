"""Holds what a user wrote against a model; what does not fit becomes one line."""

import copy
import math
from collections.abc import Iterable, Mapping
from functools import cache
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from metamask_plugin.errors import UserError, check, choose, nearest, shown

Node = dict[str, Any]


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
        faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
        raise _as_line(model, faults[0], where, also) from None
    return with_defaults(model, node)


def with_defaults(model: type[BaseModel], node: Mapping[str, Any] | None) -> Node:
    """A copy with the model's default for each key that is missing or null, block by block."""
    found = dict(node or {})
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found[name] = with_defaults(field.annotation, found.get(name))
        elif found.get(name) is None and not field.is_required():
            found[name] = copy.copy(field.default)
    return found


def block_of(annotation: Any) -> type[BaseModel] | None:
    """The model of a block of keys; None for any other kind of value."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    for kind in kinds:
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


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


@cache
def schema_of(model: type[BaseModel]) -> Node:
    """The model as JSON schema."""
    return model.model_json_schema()


def schema_at(model: type[BaseModel], path: Iterable[str | int]) -> tuple[Node, list[str | int]]:
    """The schema of a value, and as much of the path as leads to one."""
    root = schema_of(model)
    node, walked = root, []
    for step in path:
        options = [_resolved(root, option) for option in (node, *node.get("anyOf", ()))]
        options += [_resolved(root, inner) for option in options for inner in option.get("anyOf", ())]
        inside = "items" if isinstance(step, int) else "properties"
        found = next((option[inside] for option in options if inside in option), None)
        if found is None or not (isinstance(step, int) or step in found):
            break
        node = found if isinstance(step, int) else found[step]
        walked.append(step)
    return _resolved(root, node), walked


def _resolved(root: Node, node: Node) -> Node:
    if "$ref" not in node:
        return node
    return root["$defs"][node["$ref"].rpartition("/")[2]]


def describe(schema: Node, value: Any = None) -> str:
    """Words for what a value may be: completes "must be ...".

    Args:
        schema: of the value.
        value: what was found, which a limit that nobody meets is told to.
    """
    if "expected" in schema:
        return schema["expected"]
    if "anyOf" in schema:
        kinds = [describe(option, value) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in schema or "enum" in schema:
        options = schema.get("enum", [schema.get("const")])
        return str(options[0]) if len(options) == 1 else f"one of {', '.join(sorted({*map(str, options)}))}"
    words = {"boolean": "True or False", "string": "text", "array": "a list", "object": "a block of keys"}
    words |= {"integer": "an integer", "number": "a number"}
    kind = words.get(schema.get("type", "object" if "$ref" in schema else ""), "a value")
    return f"{kind} {limits(schema, value)}".strip()


def limits(schema: Node, value: Any = None) -> str:
    """The range in symbols."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "maximum": "<="}
    number = isinstance(value, int | float)
    shown_limits = [
        f"{sign} {schema[name]:g}" if isinstance(schema[name], float) else f"{sign} {schema[name]}"
        for name, sign in signs.items()
        if name in schema and not _a_slips(name, schema[name], value if number else 0)
    ]
    return " and ".join(shown_limits)


def _a_slips(name: str, limit: float, value: float) -> bool:
    """Whether a limit is one that only slips exceed, and this value does not."""
    return abs(limit) > 1 and (name == "maximum" and value <= limit or name == "minimum" and limit < -1)


def _as_line(model: type[BaseModel], fault: Any, where: str, also: Iterable[str]) -> UserError:
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # of a rule between keys, which names them
        place = spelt(fault["loc"], where)
        entry = place[: place.rfind("]") + 1]
        return UserError(f"{entry}.{cause}" if entry else str(cause))
    unknown = fault["type"] == "extra_forbidden"
    schema, path = schema_at(model, fault["loc"][:-1] if unknown else fault["loc"])
    name = spelt(path, where)
    if unknown:
        every = [*keys_of(model, f"{where}." if where else ""), *also]
        return unknown_key(name, fault["loc"][-1], schema["properties"], every)
    value = fault["input"]
    if fault["type"] == "missing":
        return UserError(f"{name} must be set, got None; add it to the config")
    context = fault.get("ctx", {}) if fault["type"] == "refused" else {}
    options = choices(schema)
    try:
        if options and not context and "expected" not in schema and _only_words(schema):
            choose(name, value, options)
        if fault["type"] == "finite_number" or isinstance(value, float) and not math.isfinite(value):
            check(False, name, "a finite number", value)
        remedy = context.get("remedy") or _remedy(schema, value)
        check(False, name, context.get("expected") or describe(schema, value), value, remedy)
    except UserError as error:
        return error
    raise AssertionError("unreachable")


def choices(schema: Node) -> list[str]:
    """The words that a value may be."""
    nodes = [schema, *schema.get("anyOf", ())]
    return sorted({str(option) for node in nodes for option in node.get("enum", _word(node))})


def _word(node: Node) -> list[str]:
    return [node["const"]] if isinstance(node.get("const"), str) else []


def _only_words(schema: Node) -> bool:
    options = schema.get("anyOf", [schema])
    return all("enum" in option or _word(option) or option.get("type") == "null" for option in options)


def _remedy(schema: Node, value: Any) -> str:
    """For what YAML reads as another kind than was meant."""
    kinds = {option.get("type") for option in (schema, *schema.get("anyOf", ()))}
    if kinds & {"integer", "number"}:
        if isinstance(value, bool):
            return "a switch is no number"
        if isinstance(value, float) and value.is_integer() and abs(value) < 1e15 and "number" not in kinds:
            return f"write {int(value)}"
        if isinstance(value, str):
            try:
                number = float(value)
            except ValueError:
                return ""
            if number.is_integer() and "number" not in kinds:
                number = int(number)
            return f"this is text, not a number: write {number!r} without quotes" * math.isfinite(number)
    if "boolean" in kinds and str(value).lower() in ("true", "false"):
        return "write it without quotes"
    return ""


def spelt(path: Iterable[str | int], where: str = "") -> str:
    """A place as the user writes it: ``augmentations[0].crop_size``."""
    text = where
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{step}" if text else step
    return text


def unknown_key(where: str, key: Any, known: Iterable[str], every: Iterable[str] = ()) -> UserError:
    """What is said of a key that there is none of: the ones that there are, and the nearest.

    Args:
        where: the block that it was found in, as the user writes it; empty for the whole config.
        key: the key.
        known: the block's keys.
        every: dotted names of all keys, for one that was put into the wrong block.
    """
    known = sorted(known)
    block = where or "the config"
    hint = nearest(key, known)
    if hint is None:
        elsewhere = sorted((full for full in every if full.rpartition(".")[2] == str(key)), key=len)
        hint = elsewhere[0] if elsewhere else nearest(key, every)
    remedy = f"did you mean {hint!r}?" if hint else f"take it out of {block}"
    return UserError(f"a key of {block} must be one of {', '.join(known)}, got {shown(key)}; {remedy}")


def without_nulls(model: type[BaseModel], node: Node) -> Node:
    """Without the model's keys that are null, and blocks that are empty then; kwargs stay as they are."""
    found = {}
    for name, value in node.items():
        inner = block_of(model.model_fields[name].annotation)
        value = without_nulls(inner, value) if inner is not None and value is not None else value
        if value is not None and (inner is None or value):
            found[name] = value
    return found
