"""The experiment of a run: the settings and images that decide what is trained, in canonical form."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from metamask_plugin.config.solo_learn import SOLO_LEARN
from metamask_plugin.renamed import in_new_names, put, take, with_earlier_names

NOT_THE_EXPERIMENT = (
    "auto_resume",
    "checkpoint",
    "evaluation",
    "name",
    "process_timeout",
    "resume_from_checkpoint",
    "wandb",
)
"""Top-level config keys that do not change what is trained, nor which run it is."""

WITHOUT_EFFECT = (
    *NOT_THE_EXPERIMENT,
    "accelerator",
    "data.download",
    "data.format",
    "data.invalid_images",
    "data.on_device",
    "data.train_path",
    "data.val_path",
    "data.verify",
    "debug_augmentations",
    "knn_eval",
    "numerics",
)
"""Keys that cannot change the bits of a training. Of images the fingerprint counts, not the path."""

NOT_IN_THE_DIGEST = ("data.num_workers",)
"""Keys that change only the draws of views: a run resumes with another value, with a note."""

RAISABLE = ("max_epochs", "max_steps")
"""The length of a run: a longer run can continue a shorter one."""

PRECISIONS = {"32": "32-true", "64": "64-true", "16": "16-mixed", "bf16": "bf16-mixed"}
DEFAULTS = {
    **SOLO_LEARN,
    "accumulate_grad_batches": 1,
    "benchmark": False,
    "deterministic": False,
    "gradient_clip_val": 0,
    "limit_train_batches": 1.0,
    "max_steps": -1,
    "performance.compile": False,
    "performance.cuda_graph": False,
    "sync_batchnorm": False,
}
"""Values of keys that neither the command line nor a method fills in."""


def experiment_of(
    cfg: DictConfig, devices: int, device: str, pipeline: str, images_fingerprint: str
) -> dict[str, Any]:
    """The settings that decide what is trained, as plain values; equivalent values become equal.

    Renamed keys keep their old names and values here, so that runs of earlier versions are found.

    Args:
        cfg: the complete config, with the method's defaults.
        devices: number of devices that the run uses on each machine.
        device: their kind, ``cpu`` or ``cuda``.
        pipeline: makes the views, see :class:`~metamask_plugin.data.PretrainDataModule`.
        images_fingerprint: of the training images.
    """
    node = OmegaConf.to_container(cfg, resolve=True)
    for key in WITHOUT_EFFECT:
        take(node, key)
    with_earlier_names(node)
    for key, default in DEFAULTS.items():
        value = take(node, key)
        one_batch = key == "limit_train_batches" and type(value) is int  # 1 batch; 1.0 is all of them
        if value is not None and (value != default or one_batch):
            put(node, key, value)
    precision = str(node.get("precision"))
    node |= {"devices": devices, "device": device, "precision": PRECISIONS.get(precision, precision)}
    if devices * (node.get("num_nodes") or 1) == 1 or node.get("strategy") in ("auto", "ddp"):
        node.pop("strategy", None)
    if "gradient_clip_val" not in node or node.get("gradient_clip_algorithm") == "norm":
        node.pop("gradient_clip_algorithm", None)
    data = node["data"]
    data |= {"pipeline": pipeline, "images_fingerprint": images_fingerprint}
    data["kwargs"] = {key: _name_of(value) for key, value in (data.get("kwargs") or {}).items()}
    if pipeline == "kornia":
        data.pop("num_workers", None)  # kornia has none
    else:
        data.pop("evaluation_resize", None)  # kornia keeps the images in this size
    return _canonical(node)


def _name_of(value: Any) -> Any:
    """The last part of a path: the folder decides nothing."""
    return os.path.basename(value) if isinstance(value, str) else value


def experiment_digest(experiment: Mapping[str, Any]) -> str:
    """Eight hex digits that differ whenever two experiments train something else."""
    counted = [(key, value) for key, value in sorted(leaves(experiment)) if key not in NOT_IN_THE_DIGEST]
    return hashlib.sha256(json.dumps(counted, default=str).encode()).hexdigest()[:8]


def differences(recorded: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two runs differ, by dotted key: the recorded value and the wanted one.

    A run without a record, as those of earlier versions, differs in nothing.
    """
    there, here = dict(leaves(recorded or wanted)), dict(leaves(wanted))
    keys = sorted(there.keys() | here.keys())
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


SHOWN = 6
"""Number of differences that a message names; it counts the others."""


def in_words(found: Mapping[str, tuple[Any, Any]]) -> str:
    """Formats differences for a message, under the keys' present names."""
    texts = []
    for key, (there, here) in found.items():
        (name, there), (_, here) = in_new_names(key, there), in_new_names(key, here)
        texts.append(f"{name} {there!r} there, {here!r} here")
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more


def leaves(tree: Any, path: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Leaves of nested mappings and lists, with their dotted keys."""
    if isinstance(tree, list | tuple):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return [(".".join(path), tree)]
    return [leaf for key, value in tree.items() for leaf in leaves(value, (*path, str(key)))]


def _canonical(value: Any) -> Any:
    """Removes nulls, which leave a key at its default, and makes 1.0 equal to 1."""
    if isinstance(value, Mapping):
        return {key: _canonical(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_canonical(entry) for entry in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
