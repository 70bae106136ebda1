"""Trained encoders from checkpoints: ours, solo-learn's, or a plain state dict."""

import pickle
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.checksums import check_records
from metamask_plugin.evaluation.recorded_config import read_args
from metamask_plugin.modules.encoder_reach import check_reach
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.modules.solo_encoders import RESNETS, Factories, build_solo_encoder

__all__ = ["Pretrained", "find_checkpoint", "load_mask", "load_pretrained", "read_args", "recorded_host"]

SUFFIXES = (".ckpt", ".pth", ".pt")
HOSTS = ("solo", "embedded")
OF_EPOCH = re.compile(r"(?P<run>.+)-ep=(?P<epoch>\d+)\.ckpt")
"""solo-learn's names of checkpoints."""

SCHEDULE = re.compile(
    r"solo\.methods\.base\.static_lr|solo\.utils\.lr_scheduler\.\w+|torch\.optim\.\w+\.\w+"
    r"|functools\.partial|builtins\.(dict|getattr)|collections\.defaultdict"
)
"""What solo-learn's methods with a fixed learning rate (SimSiam) leave in a checkpoint: their schedule."""


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

    def check_side(self, side: int, setting: str = "crop_size") -> None:
        """Refuses images of another size than in training whose border the encoder does not see.

        Args:
            side: of the images, pixels.
            setting: the config key, or flag, of the side.
        """
        if side != _lookup(self.args, "augmentations", 0, "crop_size"):
            check_reach(self.backbone, side, setting)


def find_checkpoint(path: str | Path) -> Path:
    """Returns the checkpoint file that ``path`` names: a file, or a directory that holds one.

    In a directory with several, ``last.ckpt`` is the one, or the last epoch's of one run of solo-learn.

    Raises:
        UserError: when the path is missing, has another suffix, or does not decide between files.
    """
    path = Path(path)
    check(path.exists(), "checkpoint", "an existing file or directory", str(path), "check the path")
    if path.is_dir():
        found = sorted(path.glob("*.ckpt"))
        if path / "last.ckpt" in found:
            return path / "last.ckpt"
        epochs = [OF_EPOCH.fullmatch(file.name) for file in found]
        if found and all(epochs) and len({epoch["run"] for epoch in epochs}) == 1:
            return max(zip(found, epochs), key=lambda pair: int(pair[1]["epoch"]))[0]
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


def recorded_host(args: Mapping[str, Any]) -> str | None:
    """Which host built the encoder, ``solo`` or ``embedded``; None where there is no training config.

    Our methods write it down. A run of solo-learn's own method does not, but its ``wandb_run_id``, which
    solo-learn always writes, gives it away; a config with neither is ours, from before the key.

    Args:
        args: the training config from ``args.json``.

    Raises:
        UserError: for a host that does not exist.
    """
    if not args:
        return None
    if args.get("host") is not None:
        return choose("host in args.json", args["host"], HOSTS)
    return "solo" if "wandb_run_id" in args else "embedded"


def load_pretrained(
    path: str | Path,
    backbone_name: str | None = None,
    image_size: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    host: str | None = None,
    method: str | None = None,
    solo_factories: Factories | None = None,
) -> Pretrained:
    """Loads a trained encoder, every one of its keys, and the mask if there is one.

    What is not given is taken from ``args.json`` beside the checkpoint. Files are read with
    ``weights_only=True``: they cannot run code.

    Args:
        path: a checkpoint file, or the directory of a run, ours or solo-learn's.
        backbone_name: as in :func:`~metamask_plugin.modules.encoders.build_encoder`, or solo-learn's.
        image_size: side of the images the encoder was trained on, pixels.
        backbone_kwargs: the encoder's own options.
        host: whose encoder it is, see :func:`recorded_host`.
        method: of the training; solo-learn's ViTs depend on it.
        solo_factories: see :func:`~metamask_plugin.modules.solo_encoders.build_solo_encoder`.

    Raises:
        UserError: when the file cannot be read, holds no encoder, or one that does not fit.
    """
    path = find_checkpoint(path)
    args = read_args(path)
    state = _read_state(path)
    weights = encoder_weights(state)
    own_name = _lookup(args, "backbone", "name")
    name = backbone_name or own_name
    expected = "given, as no args.json beside the checkpoint says it"
    check(name is not None, "backbone.name", expected, None, "main_knn.py: --backbone")
    if backbone_kwargs is None:
        # options of one encoder mean nothing to another
        backbone_kwargs = (_lookup(args, "backbone", "kwargs") or {}) if name == own_name else {}
    own_size = backbone_kwargs.get("image_size") or _lookup(args, "augmentations", 0, "crop_size")
    image_size = image_size or own_size
    check(image_size is not None, "data.augmentations.crop_size", expected, None, "main_knn.py: --crop_size")
    host = choose("host", host, HOSTS) if host is not None else recorded_host(args)
    if host is None and name in RESNETS and _has_small_stem(weights) and "stem" not in backbone_kwargs:
        # the same shapes in either, and other features
        remedy = "main_knn.py: --host, main_linear.py: host="
        check(False, "host", f"solo or embedded, as no args.json says who built the {name}", None, remedy)
    build = partial(
        encoder_of,
        *(
            name,
            int(image_size),
            backbone_kwargs,
            host,
            method or args.get("method"),
            weights,
            solo_factories,
        ),
    )
    backbone = _filled(build, weights, path, name, own_name)
    mask = _effective_mask(state, backbone.num_features, path)
    loaded = Pretrained(backbone.eval(), mask, args, path)
    loaded.check_side(int(image_size))
    return loaded


def load_mask(path: str | Path) -> torch.Tensor | None:
    """The effective mask weights of a trained MetaMask, (D,); None where the checkpoint has no mask.

    Args:
        path: as of :func:`load_pretrained`.

    Raises:
        UserError: when the file cannot be read, or its mask is not finite.
    """
    path = find_checkpoint(path)
    state = _read_state(path)
    size = sum(tensor.numel() for key, tensor in state.items() if key in ("mask.logit", "mask.weight"))
    return _effective_mask(state, size, path)


def encoder_of(
    name: str,
    image_size: int,
    kwargs: Mapping[str, Any],
    host: str | None,
    method: str | None,
    weights: Mapping[str, torch.Tensor],
    solo_factories: Factories | None = None,
) -> nn.Module:
    """Builds the network that a host calls ``name``, without its weights: also where they were once fetched.

    Args:
        name: ``backbone.name`` of the training.
        image_size: side of the images it was trained on, pixels.
        kwargs: its ``backbone.kwargs``.
        host: whose network is meant.
        method: ``method`` of the training.
        weights: the encoder's state dict; of it only the size of a ResNet's first convolution is used.
        solo_factories: see :func:`~metamask_plugin.modules.solo_encoders.build_solo_encoder`.
    """
    kwargs = {key: value for key, value in kwargs.items() if key != "pretrained"}
    if host == "solo":
        return build_solo_encoder(name, method, _has_small_stem(weights), solo_factories, **kwargs)
    # the embedded host takes the size for the encoder from its kwargs first
    return build_encoder(name, int(kwargs.pop("image_size", None) or image_size), **kwargs)


def _has_small_stem(weights: Mapping[str, torch.Tensor]) -> bool:
    conv = weights.get("conv1.weight")
    return conv is not None and conv.shape[-1] == 3


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
    content = read_checkpoint(path)
    check(
        isinstance(content, dict),
        f"checkpoint {path}",
        "a dictionary with a state_dict",
        type(content).__name__,
    )
    state = content.get("state_dict", content)
    named = state.items() if isinstance(state, dict) else ()
    state = {key: value for key, value in named if isinstance(key, str) and isinstance(value, torch.Tensor)}
    if not any(key.startswith("backbone.") for key in state):
        # solo-learn's name for it before 1.0.3
        state = {re.sub(r"^encoder\.", "backbone.", key): value for key, value in state.items()}
    used = {key: value for key, value in state.items() if key.startswith(("backbone.", "mask."))}
    if not any(key.startswith("backbone.") for key in used):
        prefixes = sorted({str(key).split(".")[0] for key in state or content})[:6]
        raise UserError(
            f"checkpoint {path} must have a state_dict with keys 'backbone.*', got "
            f"{', '.join(prefixes) or 'nothing'}; give a checkpoint of main_pretrain.py or solo-learn, or "
            "rewrite another's: torch.save({'state_dict': {'backbone.' + key: value for key, value in "
            "WEIGHTS.items()}}, PATH)"
        )
    check_tensors(used, path)
    return state


def check_tensors(weights: Mapping[str, torch.Tensor], path: Path) -> None:
    """Refuses tensors that are no dense real numbers in memory: sparse, complex, quantised, without numbers.

    Args:
        weights: of an encoder or a mask, by name.
        path: their file.
    """
    for key, tensor in weights.items():
        kinds = {
            "complex": tensor.is_complex(),
            "quantised": tensor.is_quantized,
            "nested": tensor.is_nested,
            "without numbers (on the meta device)": tensor.is_meta,
            f"{tensor.layout}".removeprefix("torch."): tensor.layout != torch.strided,
        }
        found = next((kind for kind, present in kinds.items() if present), None)
        remedy = "save dense real tensors on the CPU: tensor.to_dense(), tensor.cpu()"
        check(found is None, f"{key} in {path}", "a dense tensor of real numbers", found, remedy)


class _Unread:
    """Stands in for an object that is not needed: takes anything, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Unread":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _plain_dict(*args: Any) -> dict:
    return {}


def read_checkpoint(path: Path) -> Any:
    """What ``torch.save`` wrote, without running code; a schedule of solo-learn's is left out.

    Raises:
        UserError: when the file is damaged, or holds other Python objects.
    """
    check_records(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error) and "GLOBAL" not in str(error):
            raise _unreadable(path, error) from error
        foreign = _foreign_objects(path)
        if not foreign or not all(SCHEDULE.fullmatch(name) for name in foreign):
            found = f" ({', '.join(foreign[:3])})" if foreign else ""
            raise UserError(
                f"checkpoint {path} must hold tensors and plain values only, got Python objects{found}; they "
                "are not loaded, as they can run code; if you trust it, keep its weights alone: "
                "torch.save({'state_dict': torch.load(PATH, weights_only=False)['state_dict']}, PATH)"
            ) from error
    except Exception as error:  # a damaged file fails in many ways: zip, EOF, key, runtime
        raise _unreadable(path, error) from error
    stands_in = {"collections.defaultdict": _plain_dict}
    try:
        with torch.serialization.safe_globals([(stands_in.get(name, _Unread), name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # it holds these names, but not as a schedule does
        raise _unreadable(path, error) from error


def _foreign_objects(path: Path) -> list[str]:
    """Names of what a checkpoint holds beside tensors and plain values; empty where torch cannot say."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # torch before 2.6 has no such function, and not every file can be read by it
        return []


def _unreadable(path: Path, error: Exception) -> UserError:
    first_line = (str(error).splitlines() or [type(error).__name__])[0][:120]
    return UserError(
        f"checkpoint {path} must be a complete file written by torch.save, got {path.stat().st_size} bytes "
        f"that cannot be read ({first_line}); it may be truncated: copy it again or take another"
    )


def encoder_weights(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The encoder's part of a method's state dict; a momentum encoder (``momentum_backbone``) is another."""
    prefix = "backbone."
    return {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}


def _filled(
    build: Callable[[], nn.Module],
    weights: Mapping[str, torch.Tensor],
    path: Path,
    name: str,
    own_name: str | None,
) -> nn.Module:
    """The encoder with the weights.

    Names and shapes are compared on the meta device first: an encoder that the file cannot fill, maybe of a
    width for which no machine has the memory, is not built.
    """
    mismatch = None
    with suppress(Exception), torch.device("meta"):  # not every network can be built there
        mismatch = _first_mismatch(weights, build().state_dict())
    if mismatch is None:
        try:
            backbone = build()
        except (RuntimeError, ValueError, ArithmeticError, MemoryError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(
                f"backbone.name={name!r} cannot be built with its backbone.kwargs: {reason}"
            ) from error
        mismatch = _first_mismatch(weights, backbone.state_dict())
    if mismatch is None:
        backbone.load_state_dict(weights, strict=True)
        return backbone
    if own_name is not None and own_name != name:
        remedy = f"the checkpoint's own encoder is {own_name!r}: set backbone.name={own_name}"
    elif own_name is not None:
        remedy = (
            "it has the right name, so set backbone.kwargs and data.augmentations.crop_size as in training "
            "(main_knn.py: --backbone_kwargs, --crop_size)"
        )
    else:
        remedy = (
            "set backbone.name and backbone.kwargs as in the training that wrote it (main_knn.py: "
            "--backbone, --backbone_kwargs stem=cifar)"
        )
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
    broken = int((~mask.isfinite()).sum())
    if broken:
        raise UserError(
            f"mask in {path} must be finite, got NaN or infinity for {broken} of {dim} dimensions; the "
            "training has most likely diverged: lower method_kwargs.meta.optimizer.lr, or evaluate an "
            "earlier checkpoint"
        )
    return mask
