"""Any frozen encoder by one line: a run of ours or of solo-learn's, or a model of timm with weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.checkpoints import check_tensors, load_pretrained, read_checkpoint
from metamask_plugin.modules.encoder_reach import check_reach
from metamask_plugin.modules.timm_networks import timm_network

PREFIX = "timm:"
SUFFIXES = (".safetensors", ".pth", ".pt")
# where training scripts put the weights among other things, and what wrappers write before the keys
NODES = ("state_dict", "model")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")


@dataclass(frozen=True)
class FrozenEncoder:
    """An encoder whose features are to be looked at.

    Attributes:
        backbone: in evaluation mode, on the CPU; from (B, 3, s, s) to (B, D).
        mask: the effective weights (D,) of a mask learned with it, or None.
        title: what to call it in tables and figures.
        image_size: side of the images it was trained on, pixels; None where the checkpoint does not say.
        mean: per channel, of the images it was trained on; None: that of the data set.
        std: per channel; None: that of the data set.
        args: the training config from ``args.json``; empty for timm's.
        path: the file of its weights; None where timm fetched them.
    """

    backbone: nn.Module
    mask: torch.Tensor | None
    title: str
    image_size: int | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    args: dict[str, Any]
    path: Path | None


def load_frozen(
    spec: str | Path,
    title: str | None = None,
    image_size: int | None = None,
    **checkpoint: Any,
) -> FrozenEncoder:
    """Loads a frozen encoder.

    Args:
        spec: a checkpoint file or run folder, ours or solo-learn's; ``timm:<model>`` for a model with the
            weights that timm fetches; ``timm:<model>=<file>`` with those of a local file (.safetensors,
            .pth, .pt), whose classifier is left out and of which every other key must fit.
        title: by default the run folder's or the model's name.
        image_size: side of the images, pixels, where it is not the one of the training. timm's transformers
            are built for it; convolutional networks take any.
        checkpoint: further options of :func:`~metamask_plugin.evaluation.checkpoints.load_pretrained`;
            not for timm's.

    Raises:
        UserError: when the model does not exist, or its weights cannot be had or do not fit.
    """
    spec = str(spec)
    if not spec.startswith(PREFIX):
        return _of_checkpoint(spec, title, image_size, **checkpoint)
    check(not checkpoint, "options of a timm model", "title and image_size only", sorted(checkpoint))
    name, _, file = spec[len(PREFIX) :].partition("=")
    if not timm.is_model(name):
        near = timm.list_models(f"{name.split('.')[0][:4]}*")[:12] if name else []
        choose("timm model", name, near or ["any name in timm.list_models()"])
    path = Path(file) if file else None
    if path is not None:
        # the part behind a dot names the weights that are not fetched here
        backbone = timm_network(name.split(".")[0], image_size)
        _fill(backbone, _read(path), path, name)
    else:
        backbone = timm_network(name, image_size, spec, pretrained=True)
    cfg = backbone.pretrained_cfg
    if image_size is not None:
        check_reach(backbone, image_size, "crop_size")
    return FrozenEncoder(
        backbone=backbone.eval(),
        mask=None,
        title=title or name,
        image_size=image_size or int(cfg["input_size"][-1]),
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        args={},
        path=path,
    )


def _of_checkpoint(spec: str, title: str | None, image_size: int | None, **options: Any) -> FrozenEncoder:
    loaded = load_pretrained(spec, image_size=image_size, **options)
    crops = loaded.args.get("augmentations")
    entry = crops[0] if isinstance(crops, list) and crops and isinstance(crops[0], Mapping) else {}
    size = image_size or entry.get("crop_size")
    statistics = [tuple(entry[key]) if entry.get(key) is not None else None for key in ("mean", "std")]
    title = title or loaded.args.get("name") or loaded.path.resolve().parent.name
    return FrozenEncoder(
        loaded.backbone,
        loaded.mask,
        title,
        int(size) if size else None,
        *statistics,
        loaded.args,
        loaded.path,
    )


def _read(path: Path) -> dict[str, torch.Tensor]:
    name = "timm weights"
    check(path.is_file(), name, "an existing file", str(path), "check the path")
    check(path.suffix in SUFFIXES, name, f"a {', '.join(SUFFIXES)} file", str(path))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file  # comes with timm

        try:
            content = load_file(path)
        except Exception as error:
            raise UserError(
                f"{name} must be a complete safetensors file, got {path} ({str(error).splitlines()[0]}); "
                "it may be truncated: copy it again"
            ) from error
    else:
        content = read_checkpoint(path)
    for node in NODES:
        if isinstance(content, Mapping) and isinstance(content.get(node), Mapping):
            content = content[node]
    tensors = content.items() if isinstance(content, Mapping) else ()
    named = {key: value for key, value in tensors if isinstance(key, str) and isinstance(value, torch.Tensor)}
    weights = {WRAPPERS.sub("", key): value for key, value in named.items()}
    check(len(weights) > 0, name, "a state dict of tensors", str(path), "save model.state_dict()")
    check_tensors(weights, path)
    return weights


def _fill(backbone: nn.Module, weights: dict[str, torch.Tensor], path: Path, name: str) -> None:
    classifier = backbone.pretrained_cfg.get("classifier") or ()
    classifiers = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    expected = backbone.state_dict()
    heads = tuple(f"{head}." for head in classifiers)
    weights = {key: value for key, value in weights.items() if key in expected or not key.startswith(heads)}
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    differing = [key for key in expected if key in weights and weights[key].shape != expected[key].shape]
    found = None
    if missing:
        found = f"{missing[0]} {tuple(expected[missing[0]].shape)} is missing, and {len(missing) - 1} more"
    elif extra:
        found = f"{extra[0]} is not part of the model, and {len(extra) - 1} more are not"
    elif differing:
        shapes = tuple(weights[differing[0]].shape), tuple(expected[differing[0]].shape)
        found = f"{differing[0]} is {shapes[0]} in the file and {shapes[1]} in the model"
    if found is not None:
        raise UserError(
            f"{path} must hold the weights of timm's {name}, got others: {found}; "
            "take the model that wrote it, or rename its keys"
        )
    backbone.load_state_dict(weights, strict=True)
