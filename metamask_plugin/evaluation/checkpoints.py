"""Trained encoders from checkpoints: ours, solo-learn's, or a plain state dict."""

import json
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metamask_plugin.errors import UserError, check
from metamask_plugin.modules.encoders import build_encoder

SUFFIXES = (".ckpt", ".pth", ".pt")


@dataclass(frozen=True)
class Pretrained:
    """A trained encoder.

    Attributes:
        backbone: in evaluation mode, on the CPU; from (B, 3, s, s) to (B, D).
        mask: effective mask weights (D,), or None when the method has no mask.
        args: the resolved training config from ``args.json``; empty when there is none.
        path: the checkpoint file.
    """

    backbone: nn.Module
    mask: torch.Tensor | None
    args: dict[str, Any] = field(default_factory=dict)
    path: Path = Path()


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint file that ``path`` names: a file, or a directory that holds one.

    In a directory with several, ``last.ckpt`` is the one.

    Raises:
        UserError: when the path is missing, has another suffix, or does not decide between files.
    """
    path = Path(path)
    check(path.exists(), "checkpoint", "an existing file or directory", str(path), "check the path")
    if path.is_dir():
        found = sorted(path.glob("*.ckpt"))
        if path / "last.ckpt" in found:
            return path / "last.ckpt"
        names = [file.name for file in found]
        check(
            len(found) == 1,
            f"checkpoint directory {path}",
            "one with a last.ckpt or a single .ckpt file",
            names,
            "give the file itself" if found else "train first, or give the directory of one run",
        )
        return found[0]
    check(path.suffix in SUFFIXES, "checkpoint", f"a {', '.join(SUFFIXES)} file", str(path))
    return path


def read_args(checkpoint: Path) -> dict[str, Any]:
    """The training config from ``args.json`` beside a checkpoint, or an empty dict without that file.

    Raises:
        UserError: when the file is not a JSON object.
    """
    path = checkpoint.parent / "args.json"
    if not path.exists():
        return {}
    try:
        args = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} must be readable JSON, got {error}; restore it or move it away and give backbone.name"
        ) from error
    check(isinstance(args, dict), str(path), "a JSON object with the training config", type(args).__name__)
    return args


def load_pretrained(
    path: str | Path,
    backbone_name: str | None = None,
    image_size: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> Pretrained:
    """Loads a trained encoder, every one of its keys, and the mask if there is one.

    What is not given is taken from ``args.json`` beside the checkpoint. Files are read with
    ``weights_only=True``: they cannot run code.

    Args:
        path: a checkpoint file, or the directory of a run.
        backbone_name: as in :func:`~metamask_plugin.modules.encoders.build_encoder`.
        image_size: side of the images the encoder was trained on, pixels.
        backbone_kwargs: the encoder's own options.

    Raises:
        UserError: when the file cannot be read, holds no encoder, or one that does not fit.
    """
    path = find_checkpoint(path)
    args = read_args(path)
    state = _read_state(path)
    own_name = _lookup(args, "backbone", "name")
    name = backbone_name or own_name
    expected = "given, as no args.json beside the checkpoint says it"
    check(name is not None, "backbone.name", expected, None, "main_knn.py: --backbone")
    if backbone_kwargs is None:
        # options of one encoder mean nothing to another
        backbone_kwargs = (_lookup(args, "backbone", "kwargs") or {}) if name == own_name else {}
    # the embedded host takes the size for the encoder from its kwargs first
    backbone_kwargs = dict(backbone_kwargs)
    own_size = backbone_kwargs.pop("image_size", None) or _lookup(args, "augmentations", 0, "crop_size")
    image_size = image_size or own_size
    check(image_size is not None, "data.augmentations.crop_size", expected, None, "main_knn.py: --crop_size")
    backbone = build_encoder(name, int(image_size), **backbone_kwargs)
    _fill(backbone, state, path, name, own_name)
    return Pretrained(backbone.eval(), _effective_mask(state, backbone.num_features, path), args, path)


def _lookup(tree: Any, *keys: str | int) -> Any:
    for key in keys:
        if isinstance(tree, Mapping):
            tree = tree.get(key)
        elif isinstance(tree, list) and isinstance(key, int) and key < len(tree):
            tree = tree[key]
        else:
            return None
    return tree


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" in str(error) or "GLOBAL" in str(error):
            raise UserError(
                f"checkpoint {path} must hold tensors and plain values only, got other Python objects, "
                "which are not loaded because they can run code; save "
                "{'state_dict': model.state_dict()} with torch.save instead"
            ) from error
        raise _unreadable(path, error) from error
    except Exception as error:  # a damaged file fails in many ways: zip, EOF, key, runtime
        raise _unreadable(path, error) from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not any(key.startswith("backbone.") for key in state):
        prefixes = sorted({str(key).split(".")[0] for key in state})[:6]
        raise UserError(
            f"checkpoint {path} must have a state_dict with keys 'backbone.*', got "
            f"{', '.join(prefixes) or 'no tensors'}; give a checkpoint written by main_pretrain.py"
        )
    return state


def _unreadable(path: Path, error: Exception) -> UserError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UserError(
        f"checkpoint {path} must be a complete file written by torch.save, got {path.stat().st_size} bytes "
        f"that cannot be read ({first_line}); it may be truncated: copy it again or take another"
    )


def _fill(
    backbone: nn.Module, state: Mapping[str, torch.Tensor], path: Path, name: str, own_name: str | None
) -> None:
    prefix = "backbone."
    weights = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
    mismatch = _first_mismatch(weights, backbone.state_dict())
    if mismatch is None:
        backbone.load_state_dict(weights, strict=True)
        return
    if own_name is not None and own_name != name:
        remedy = f"the checkpoint's own encoder is {own_name!r}: set backbone.name={own_name}"
    elif own_name is not None:
        remedy = (
            "it has the right name, so set backbone.kwargs and data.augmentations.crop_size as in training"
        )
    else:
        remedy = "set backbone.name and backbone.kwargs as in the training that wrote it"
    raise UserError(f"checkpoint {path} does not fit backbone.name={name!r}: {mismatch}; {remedy}")


def _first_mismatch(weights: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str | None:
    for key, tensor in expected.items():
        if key not in weights:
            return f"{key} {tuple(tensor.shape)} is missing from the checkpoint"
        if weights[key].shape != tensor.shape:
            found = tuple(weights[key].shape)
            return f"{key} is {found} in the checkpoint and {tuple(tensor.shape)} in the encoder"
    extra = [key for key in weights if key not in expected]
    return f"{extra[0]} {tuple(weights[extra[0]].shape)} is not part of the encoder" if extra else None


def _effective_mask(state: Mapping[str, torch.Tensor], dim: int, path: Path) -> torch.Tensor | None:
    if "mask.logit" in state:
        mask = state["mask.logit"].float().sigmoid().flatten()
    elif "mask.weight" in state:
        mask = state["mask.weight"].float().flatten()
    else:
        return None
    check(
        mask.shape == (dim,), f"mask in {path}", f"one weight for each of {dim} dimensions", tuple(mask.shape)
    )
    return mask
