"""``args.json``, the training config beside a checkpoint: read, and checked where evaluators rely on it."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from metamask_plugin.config.fields import Block, Pixels, key
from metamask_plugin.config.messages import as_line
from metamask_plugin.config.methods import DataKwargs
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.errors import UserError, check

READ = ("augmentations", "backbone", "data", "evaluation", "method", "method_kwargs", "name", "seed")
"""Blocks and keys that evaluators and studies read. One that is missing or null is left to its reader."""

LEFT_TO_ITS_READER = ("extra_forbidden", "missing", "refused", "value_error")
"""Faults that a config of solo-learn, or of another version, may have; other words are no fault either."""


class BackboneKwargs(Block):
    """Of what encoders take: what images are resized to."""

    image_size: Pixels | None = key(None, "side of the images, pixels")


PARTS: dict[str, type[BaseModel]] = {
    "": Pretraining,
    "backbone.kwargs": BackboneKwargs,
    "data.kwargs": DataKwargs,
}


def read_args(checkpoint: Path) -> dict[str, Any]:
    """The training config from ``args.json`` beside a checkpoint, or an empty dict without that file.

    Raises:
        UserError: when the file is not a JSON object, or a key that is read holds what it cannot hold.
    """
    path = checkpoint.parent / "args.json"
    if not path.exists():
        return {}
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} must be readable JSON, got {error}; restore it or move it away and give backbone.name"
        ) from error
    check(isinstance(args, dict), str(path), "a JSON object with the training config", type(args).__name__)
    for fault in _faults(args):
        key, _, rest = str(fault).partition(" must be ")
        raise UserError(f"{key} in {path} must be {rest}; restore what the training wrote")
    return args


def _faults(args: Mapping[str, Any]) -> Iterator[UserError]:
    for where, model in PARTS.items():
        node: Any = args
        for part in where.split(".") if where else ():
            node = node.get(part) or {}
        try:
            model.model_validate(node)
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                kind, found = fault["type"], fault["input"]
                other = kind in LEFT_TO_ITS_READER or kind == "literal_error" and isinstance(found, str)
                if not other and found is not None and (where or fault["loc"][0] in READ):
                    yield as_line(model, fault, where, ())
