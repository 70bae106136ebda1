"""What is said of a value that does not fit: its key, what it may be, what was found, and the remedy.

What a value may be is read from the model's JSON schema, as are the tables of the documentation.
"""

import math
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from typing import Any

from pydantic import BaseModel

from metamask_plugin.errors import UserError, nearest, shown

Node = dict[str, Any]


@cache
def schema_of(model: type[BaseModel]) -> Node:
    """The model as JSON schema."""
    return model.model_json_schema()


def schema_at(model: type[BaseModel], path: Iterable[str | int]) -> tuple[Node, list[str | int]]:
    """The schema of a value, and as much of the path as leads to one."""
    root = schema_of(model)
    node, walked = root, []
    for step in path:
        inside = "items" if isinstance(step, int) else "properties"
        found = next((kind[inside] for kind in _kinds(root, node) if inside in kind), None)
        if found is None or not (isinstance(step, int) or step in found):
            break
        node = found if isinstance(step, int) else found[step]
        walked.append(step)
    # of what may be a block or null, the block: its keys are asked for
    return next((kind for kind in _kinds(root, node) if "properties" in kind), node), walked


def _kinds(root: Node, node: Node) -> list[Node]:
    """What a value may be, with references followed: one schema each."""
    if "$ref" in node:
        node = root["$defs"][node["$ref"].rpartition("/")[2]]
    return [kind for option in node["anyOf"] for kind in _kinds(root, option)] if "anyOf" in node else [node]


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
    options = choices(schema)
    if options:
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    words = {"boolean": "True or False", "string": "text", "array": "a list", "object": "a block of keys"}
    words |= {"integer": "an integer", "number": "a number"}
    kind = words.get(schema.get("type", "object" if "$ref" in schema else ""), "a value")
    return f"{kind} {limits(schema, value)}".strip()


def limits(schema: Node, value: Any = None) -> str:
    """The range in symbols."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "exclusiveMaximum": "<", "maximum": "<="}
    found, parts = value if isinstance(value, int | float) else 0, []
    for name, sign in signs.items():
        limit = schema.get(name)
        # a limit that only slips exceed goes unsaid
        if limit is not None and not (limit < -1 or name == "maximum" and limit > 1 and found <= limit):
            parts.append(f"{sign} {limit:g}" if isinstance(limit, float) else f"{sign} {limit}")
    return " and ".join(parts)


def as_line(model: type[BaseModel], fault: Any, where: str, every: Iterable[str]) -> UserError:
    """A fault in one line.

    Args:
        model: what there may be.
        fault: as pydantic describes it.
        where: name of the block that was held against the model.
        every: dotted names of all keys, for one that was put into the wrong block.
    """
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UserError):  # of a rule between keys, which names them
        places = [index for index, step in enumerate(fault["loc"]) if isinstance(step, int)]
        entry = spelt(fault["loc"][: places[-1] + 1], where) if places else ""
        return UserError(f"{entry}.{cause}" if entry else str(cause))
    unknown = fault["type"] == "extra_forbidden"
    schema, path = schema_at(model, fault["loc"][:-1] if unknown else fault["loc"])
    name = spelt(path, where)
    if unknown:
        return unknown_key(name, fault["loc"][-1], schema["properties"], every)
    if fault["type"] == "missing":
        return UserError(f"{name} must be set, got None; add it to the config")
    value, said = fault["input"], fault.get("ctx", {}) if fault["type"] == "refused" else {}
    infinite = isinstance(value, float) and not math.isfinite(value)
    expected = said.get("expected") or ("a finite number" if infinite else describe(schema, value))
    remedy = said.get("remedy") or _remedy(schema, value)
    return UserError(f"{name} must be {expected}, got {shown(value)}" + (f"; {remedy}" if remedy else ""))


def choices(schema: Node) -> list[str]:
    """The words that a value may be."""
    found = [option for node in (schema, *schema.get("anyOf", ())) for option in node.get("enum", [])]
    found += [node["const"] for node in (schema, *schema.get("anyOf", ())) if "const" in node]
    return sorted({str(option) for option in found})


def _remedy(schema: Node, value: Any) -> str:
    """The nearest word; and for what YAML reads as another kind than was meant, how to write it."""
    kinds = {option.get("type") for option in (schema, *schema.get("anyOf", ()))}
    numeric, whole = bool(kinds & {"integer", "number"}), "number" not in kinds
    if numeric and isinstance(value, bool):
        return "a switch is no number"
    if numeric and whole and isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return f"write {int(value)}"
    if numeric and isinstance(value, str):
        with suppress(ValueError, OverflowError):
            number = float(value)
            number = int(number) if whole and number.is_integer() else number
            return f"this is text, not a number: write {number!r} without quotes" * math.isfinite(number)
    if "boolean" in kinds and str(value).lower() in ("true", "false"):
        return "write it without quotes"
    hint = nearest(value, choices(schema))
    return f"did you mean {hint!r}?" if hint else ""


def spelt(path: Iterable[str | int], where: str = "") -> str:
    """A place as the command line writes it: ``augmentations.0.crop_size``."""
    return ".".join([where] * bool(where) + [str(step) for step in path])


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
