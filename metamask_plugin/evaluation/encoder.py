"""Trained encoders: a run of ours or of solo-learn's, a plain state dict, or a model of timm with weights."""

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.checkpoints import (
    HOSTS,
    check_tensors,
    effective_mask,
    encoder_weights,
    find_checkpoint,
    read_args,
    read_checkpoint,
    read_weights,
    recorded_host,
)
from metamask_plugin.modules.encoder_reach import check_reach
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.modules.timm_networks import timm_network

TIMM = "timm:"
SUFFIXES = (".safetensors", ".pth", ".pt")
# where training scripts put the weights among other things, and what wrappers write before the keys
NODES = ("state_dict", "model")
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")

AMBIGUOUS = ("resnet18", "resnet50")
"""Networks of both hosts: the same weight shapes with the small stem, and other features."""


Builder = Callable[[str, int, str | None, bool, dict[str, Any]], nn.Module]


def _ours(
    name: str, image_size: int, method: str | None, small_stem: bool, kwargs: dict[str, Any]
) -> nn.Module:
    # the embedded host takes the size for the encoder from its kwargs first
    return build_encoder(name, int(kwargs.pop("image_size", None) or image_size), **kwargs)


BUILDERS: dict[str, Builder] = {"embedded": _ours}
"""What a host means by a network's name: ``builder(name, image_size, method, small_stem, kwargs)``.

``small_stem`` says whether a ResNet's first convolution is 3x3. The package ``metamask_plugin.host`` adds
solo-learn's.
"""


@dataclass(frozen=True)
class Encoder:
    """A trained encoder, and what is known of its training.

    Attributes:
        backbone: in evaluation mode, on the CPU; from (B, 3, s, s) to (B, D).
        mask: effective weights (D,) of a mask that was learned with it, or None.
        args: the training config from ``args.json``; empty when there is none.
        path: the file of its weights; None where timm fetched them.
        view: of the images it was trained on, as far as it is known: ``crop_size`` in pixels, ``mean`` and
            ``std`` per channel, and the rest of an entry of solo-learn's ``augmentations``.

    Example:
        >>> import json, tempfile
        >>> run, network = Path(tempfile.mkdtemp()), build_encoder("conv4", 32, width=8)
        >>> state = {f"backbone.{key}": value for key, value in network.state_dict().items()}
        >>> torch.save({"state_dict": state}, run / "last.ckpt")
        >>> backbone = {"name": "conv4", "kwargs": {"width": 8}}
        >>> args = {"method": "metamask", "backbone": backbone, "augmentations": [{"crop_size": 32}]}
        >>> _ = (run / "args.json").write_text(json.dumps(args))
        >>> encoder = load_encoder(run)
        >>> encoder.dim, encoder.view["crop_size"], encoder.mask
        (64, 32, None)
        >>> encoder.backbone(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 64])
    """

    backbone: nn.Module
    mask: torch.Tensor | None = None
    args: dict[str, Any] = field(default_factory=dict)
    path: Path | None = None
    view: Mapping[str, Any] = field(default_factory=dict)

    @property
    def dim(self) -> int:
        """D, the number of features."""
        return self.backbone.num_features

    @property
    def trained_on(self) -> str:
        """The region of its training images: ``full``, ``foreground`` or ``background``."""
        return (self.args.get("data") or {}).get("region") or "full"

    def check_side(self, side: int, setting: str = "crop_size") -> None:
        """Refuses images of another size than in training whose border the encoder does not see.

        Args:
            side: of the images, pixels.
            setting: the config key, or flag, of the side.

        Raises:
            UserError: the encoder does not see the border, or cannot take such images.
        """
        if side != self.view.get("crop_size"):
            check_reach(self.backbone, side, setting)


def load_encoder(
    source: str | Path,
    backbone_name: str | None = None,
    image_size: int | None = None,
    backbone_kwargs: Mapping[str, Any] | None = None,
    host: str | None = None,
    method: str | None = None,
) -> Encoder:
    """Loads a trained encoder, every one of its keys, and the mask if there is one.

    What is not given is taken from ``args.json`` beside the checkpoint. Files are read with
    ``weights_only=True``: they cannot run code. See :class:`Encoder` for an example.

    Args:
        source: a checkpoint file, or the directory of a run, ours or solo-learn's; ``timm:<model>`` for a
            model with the weights that timm fetches; ``timm:<model>=<file>`` with those of a local file
            (.safetensors, .pth, .pt), whose classifier is left out.
        backbone_name: as in :func:`~metamask_plugin.modules.encoders.build_encoder`, or solo-learn's.
        image_size: side of the images the encoder was trained on, pixels; of timm's, by default the model's.
        backbone_kwargs: the encoder's own options.
        host: whose network is meant, a key of :data:`BUILDERS`; by default
            :func:`~metamask_plugin.evaluation.checkpoints.recorded_host`.
        method: of the training; solo-learn's ViTs depend on it.

    Raises:
        UserError: when the file cannot be read, holds no encoder, or one that does not fit.
    """
    source = str(source)
    if source.startswith(TIMM):
        given = {"backbone_name": backbone_name, "backbone_kwargs": backbone_kwargs, "host": host}
        given = sorted(key for key, value in {**given, "method": method}.items() if value is not None)
        check(not given, "options of a timm model", "image_size only", given)
        return _of_timm(source, image_size)
    path = find_checkpoint(source)
    args, state = read_args(path), read_weights(path)
    weights, recorded = encoder_weights(state), args.get("backbone") or {}
    view = next(iter(args.get("augmentations") or []), {})
    name = backbone_name or recorded.get("name")
    expected = "given, as no args.json beside the checkpoint says it"
    check(name is not None, "backbone.name", expected, None, "main_knn.py: --backbone")
    if backbone_kwargs is None:  # options of one encoder mean nothing to another
        backbone_kwargs = (recorded.get("kwargs") or {}) if name == recorded.get("name") else {}
    image_size = image_size or backbone_kwargs.get("image_size") or view.get("crop_size")
    check(image_size is not None, "data.augmentations.crop_size", expected, None, "main_knn.py: --crop_size")
    host = choose("host", host, HOSTS) if host is not None else recorded_host(args)
    if host is None and name in AMBIGUOUS and _has_small_stem(weights) and "stem" not in backbone_kwargs:
        remedy = "main_knn.py: --host, main_linear.py: host="
        check(False, "host", f"solo or embedded, as no args.json says who built the {name}", None, remedy)

    def build() -> nn.Module:
        where = (host, method or args.get("method"), weights)
        return network_of(name, int(image_size), backbone_kwargs, *where)

    backbone = _filled(build, weights, path, name, recorded.get("name")).eval()
    mask = effective_mask(state, backbone.num_features, path)
    encoder = Encoder(backbone, mask, args, path, view or {"crop_size": image_size})
    if image_size != view.get("crop_size"):
        check_reach(backbone, image_size, "crop_size")
    return encoder


def network_of(
    name: str,
    image_size: int,
    kwargs: Mapping[str, Any],
    host: str | None,
    method: str | None,
    weights: Mapping[str, torch.Tensor],
) -> nn.Module:
    """Builds the network that a host calls ``name``, without its weights: also where they were once fetched.

    Args:
        name: ``backbone.name`` of the training.
        image_size: side of the images it was trained on, pixels.
        kwargs: its ``backbone.kwargs``.
        host: a key of :data:`BUILDERS`; None for ours.
        method: ``method`` of the training.
        weights: the encoder's state dict; of it only the size of a ResNet's first convolution is used.

    Raises:
        UserError: for a name or arguments without a network, or a host that is not loaded.

    Example:
        >>> network_of("conv4", 32, {"width": 8, "pretrained": True}, None, "metamask", {}).num_features
        64
    """
    builder = BUILDERS.get(host or "embedded")
    remedy = "import metamask_plugin.host"
    check(builder is not None, "host", f"one of {', '.join(BUILDERS)}", host, remedy)
    kwargs = {key: value for key, value in kwargs.items() if key != "pretrained"}
    return builder(name, image_size, method, _has_small_stem(weights), kwargs)


def _has_small_stem(weights: Mapping[str, torch.Tensor]) -> bool:
    conv = weights.get("conv1.weight")
    return conv is not None and conv.shape[-1] == 3


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
    if own_name is None:
        remedy = (
            "set backbone.name and backbone.kwargs as in the training that wrote it (main_knn.py: "
            "--backbone, --backbone_kwargs stem=cifar)"
        )
    elif own_name != name:
        remedy = f"the checkpoint's own encoder is {own_name!r}: set backbone.name={own_name}"
    else:
        remedy = (
            "it has the right name, so set backbone.kwargs and data.augmentations.crop_size as in training "
            "(main_knn.py: --backbone_kwargs, --crop_size)"
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


def _of_timm(source: str, image_size: int | None) -> Encoder:
    name, _, file = source.removeprefix(TIMM).partition("=")
    if not timm.is_model(name):
        near = timm.list_models(f"{name.split('.')[0][:4]}*")[:12] if name else []
        choose("timm model", name, near or ["any name in timm.list_models()"])
    path = Path(file) if file else None
    if path is None:
        backbone = timm_network(name, image_size, source, pretrained=True)
    else:  # the part behind a dot names the weights that are not fetched here
        backbone = timm_network(name.split(".")[0], image_size)
        weights, expected = _timm_weights(path), backbone.state_dict()
        heads = backbone.pretrained_cfg.get("classifier") or ()
        heads = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
        weights = {
            key: value for key, value in weights.items() if key in expected or not key.startswith(heads)
        }
        mismatch = _first_mismatch(weights, expected)
        if mismatch is not None:
            remedy = "take the model that wrote it, or rename its keys"
            raise UserError(f"{path} does not fit timm's {name}: {mismatch}; {remedy}")
        backbone.load_state_dict(weights, strict=True)
    if image_size is not None:
        check_reach(backbone, image_size, "crop_size")
    cfg = backbone.pretrained_cfg
    view = {"crop_size": image_size or int(cfg["input_size"][-1]), "mean": cfg["mean"], "std": cfg["std"]}
    return Encoder(backbone.eval(), path=path, view=view)


def _timm_weights(path: Path) -> dict[str, torch.Tensor]:
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
