"""Writes docs/keys.md, and docs/schemas/*.json for editors: every key of every config, from its model.

python tools/keys_page.py
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import VERSION, BaseModel

from metamask_plugin.config import linear
from metamask_plugin.config.linear import Linear
from metamask_plugin.config.messages import limits, schema_at, schema_of
from metamask_plugin.config.methods import ICLMSR, Baseline, DataKwargs, MetaMask, TaskKwargs
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import keys_of
from metamask_plugin.config.solo_learn import WITHOUT_EFFECT
from metamask_plugin.config.studies import MEASURES, Study
from metamask_plugin.config.views import View
from metamask_plugin.methods import icl_msr, metamask

PYDANTIC = ".".join(VERSION.split(".")[:2])
"""Another version writes the same schema otherwise."""
DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE = DOCS / "keys.md"
HEAD = """# Every key

What a config may hold, which values each key takes, and what it means where the config is silent. Made by
`make keys` from the models that configs are checked against (`metamask_plugin/config`). Explanations with
examples are in [configuration](configuration.md). Keys of solo-learn or Lightning alone are accepted and not
listed. `null` stands for the default.

An editor that knows JSON schema completes and checks keys: put
`# yaml-language-server: $schema=<clone>/docs/schemas/pretrain.json` (or `linear.json`, `study.json`) into the
first line of a config.
"""
TASK_NOTE = "Which of these a task has, and their defaults, its constructor says."


def page() -> str:
    """The page as it is to be."""
    return "\n".join([HEAD, *(f"## {title}\n\n{body}\n" for title, body in _sections())])


def schemas() -> dict[str, str]:
    """JSON schemas by name, of configs that are laid over others: no key is required in them."""
    method = [_part(model) for model in (MetaMask, ICLMSR, Baseline)]
    found = {"pretrain": _part(Pretraining), "linear": _part(Linear), "study": _part(Study)}
    found["pretrain"]["properties"]["method_kwargs"] = {
        "description": "of the method",
        "anyOf": [*({"$ref": f"#/$defs/{node['title']}"} for node in method), *SILENT],
    }
    for node in method:
        found["pretrain"]["$defs"] |= {**node.pop("$defs"), node["title"]: node}
    for name, ignored in (("pretrain", WITHOUT_EFFECT), ("linear", linear.WITHOUT_EFFECT)):
        for key in ignored:
            _accept(found[name], key)
    found["study"]["additionalProperties"] = True  # keys of its own, which others refer to
    made = {"$comment": f"made by tools/keys_page.py with pydantic {PYDANTIC}"}
    return {name: json.dumps({**made, **node}, indent=1) + "\n" for name, node in found.items()}


SILENT: list[dict[str, Any]] = [{"type": "null"}, {"type": "string", "pattern": r"\$\{|^\?\?\?$"}]
"""What any key of a file may be: null, for its default; an interpolation; left to the command line."""


def _part(model: type[BaseModel]) -> dict[str, Any]:
    schema = json.loads(json.dumps(schema_of(model)))
    for node in (schema, *schema.get("$defs", {}).values()):
        node.pop("required", None)
        for key, inner in node["properties"].items():
            about = {name: inner.pop(name) for name in ("description", "default") if name in inner}
            node["properties"][key] = {**about, "anyOf": [inner, *SILENT]}
    for name in ("defaults", "hydra"):
        schema["properties"][name] = {"description": "Hydra's"}
    return schema


def _accept(schema: dict[str, Any], key: str) -> None:
    """Enters a key of solo-learn's, whose values are not checked."""
    block, _, last = key.rpartition(".")
    node = schema
    if block:
        other = {"anyOf": [{"type": "object", "properties": {}}]}
        option = schema["properties"].setdefault(block, other)["anyOf"][0]
        node = schema["$defs"][option["$ref"].rpartition("/")[2]] if "$ref" in option else option
    node["properties"].setdefault(last, {"description": "solo-learn's"})


def _sections() -> Iterator[tuple[str, str]]:
    yield "Pretraining", table(Pretraining)
    yield "`augmentations`, each entry", table(View)
    own = [key for key in keys_of(Baseline) if key not in {*keys_of(MetaMask), *keys_of(ICLMSR)}]
    for title, model, module in (("MetaMask", MetaMask, metamask), ("ICL-MSR", ICLMSR, icl_msr)):
        defaults = {**_flat(module.PRESETS["paper"]), "preset": "paper"}
        yield f"`method_kwargs` of {title}", table(model, defaults)
    yield "`method_kwargs` of a task alone (`method=baseline`)", table(Baseline, {}, own)
    yield "`method_kwargs.task_kwargs`", f"{table(TaskKwargs, {})}\n\n{TASK_NOTE}"
    yield "`data.kwargs`", table(DataKwargs, {})
    yield "Linear evaluation and fine-tuning", table(Linear)
    yield "Studies", table(Study, {})
    for name, options in MEASURES.items():
        if options.model_fields:
            yield f"Studies: `measures.{name}`", table(options, {})


def table(
    model: type[BaseModel], defaults: Mapping[str, Any] | None = None, keys: list[str] | None = None
) -> str:
    """Key, values, default, meaning.

    Args:
        model: whose keys they are.
        defaults: by key, in place of the model's own.
        keys: that are shown; all by default.
    """
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for key in keys or keys_of(model):
        schema, _ = schema_at(model, key.split("."))
        given = {"": schema["default"]} if "default" in schema else {}
        given = given if defaults is None else {"": defaults[key]} if key in defaults else {}
        default = f"`{_as_typed(given[''])}`" if given else ""
        lines.append(f"| `{key}` | {_values(schema)} | {default} | {schema['description']} |")
    return "\n".join(lines)


def _values(schema: Mapping[str, Any]) -> str:
    """What a value may be, as a table's cell."""
    if "anyOf" in schema:
        return ", ".join(part for part in map(_values, schema["anyOf"]) if part != "null")
    if "enum" in schema or "const" in schema:
        options = dict.fromkeys(map(str, schema.get("enum", [schema.get("const")])))
        return ", ".join(f"`{option}`" for option in options)
    kinds = {"string": "text", "array": "list", "object": "block", "boolean": "True, False"}
    kind = schema.get("expected", "").removeprefix("a ") if schema.get("type") == "string" else ""
    kind = kind or kinds.get(schema.get("type", ""), schema.get("type", ""))
    return f"{kind} {limits(schema)}".strip()


def _as_typed(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "").replace(" ", "") or '""'


def _flat(node: Mapping[str, Any], within: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in node.items():
        inner = isinstance(value, Mapping) and value
        found |= _flat(value, f"{within}{key}.") if inner else {f"{within}{key}": value}
    return found


if __name__ == "__main__":
    PAGE.write_text(page())
    (DOCS / "schemas").mkdir(exist_ok=True)
    for name, text in schemas().items():
        (DOCS / "schemas" / f"{name}.json").write_text(text)
