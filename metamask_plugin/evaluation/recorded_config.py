"""``args.json``, the training config beside a checkpoint: read, and checked where evaluators rely on it."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from metamask_plugin.errors import UserError, check

LARGEST_SIDE = 8192
"""Pixels, as for ``crop_size`` in a training."""

LARGEST_NUMBER = 1e9

Check = tuple[str, Callable[[Any], bool]]


def _number(value: Any) -> bool:
    return (isinstance(value, int | float) and not isinstance(value, bool)) and abs(value) <= LARGEST_NUMBER


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _between(least: int, most: int) -> Check:
    return f"a whole number from {least} to {most}", lambda value: _whole(value) and least <= value <= most


def _channels(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_number(entry) for entry in value)


def _blocks(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 0 and all(isinstance(entry, Mapping) for entry in value)


BLOCK: Check = ("a block of keys", lambda value: isinstance(value, Mapping))
TEXT: Check = ("text", lambda value: isinstance(value, str))
FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
WHOLE: Check = ("a whole number of at least 0", _whole)
NUMBER: Check = ("a finite number", _number)
CHANNELS: Check = ("a list of three numbers", _channels)
SIDE: Check = _between(1, LARGEST_SIDE)

KEYS: dict[str, Check] = {
    **dict.fromkeys(("backbone", "data", "method_kwargs", "evaluation", "optimizer"), BLOCK),
    **dict.fromkeys(("name", "method", "backbone.name", "data.dataset"), TEXT),
    "seed": WHOLE,
    "backbone.kwargs": BLOCK,
    "augmentations": ("a list of blocks", _blocks),
    "data.kwargs": BLOCK,
    "backbone.kwargs.image_size": SIDE,
    "data.kwargs.size": SIDE,
    "data.kwargs.copies": _between(1, 1000),
    "data.fraction": (
        "between 0 and 1, or -1",
        lambda value: _number(value) and (value == -1 or 0 < value < 1),
    ),
    "data.bits": _between(8, 16),
    "data.evaluation_resize": SIDE,
    "data.num_workers": WHOLE,
    **{f"data.{key}": TEXT for key in ("train_path", "val_path", "format", "pipeline")},
    **{f"data.{key}": TEXT for key in ("region", "region_form", "verify", "invalid_images")},
    **{f"data.{key}": FLAG for key in ("download", "no_labels")},
    **{f"data.{key}": CHANNELS for key in ("mean", "std")},
    "method_kwargs.task": TEXT,
    "method_kwargs.task_kwargs": BLOCK,
    "method_kwargs.mask": BLOCK,
    "method_kwargs.meta": BLOCK,
    "evaluation.knn": BLOCK,
    "evaluation.knn.temperature": NUMBER,
}
"""What evaluators and studies read. A key that is missing or null is left to its reader."""

OF_A_VIEW: dict[str, Check] = {"crop_size": SIDE, "num_crops": WHOLE, "mean": CHANNELS, "std": CHANNELS}
"""Of each entry of ``augmentations``."""


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
    for key, wanted in KEYS.items():
        _hold(path, key, _lookup(args, key), wanted)
    for index, entry in enumerate(args.get("augmentations") or []):
        for key, wanted in OF_A_VIEW.items():
            _hold(path, f"augmentations[{index}].{key}", entry.get(key), wanted)
    return args


def _hold(path: Path, key: str, value: Any, wanted: Check) -> None:
    expected, fits = wanted
    remedy = "restore what the training wrote"
    check(value is None or fits(value), f"{key} in {path}", expected, value, remedy)


def _lookup(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree
