"""The networks that solo-learn means by its backbones' names, as its checkpoints hold them.

The same name, even the same weight shapes, can be another network there than in
:mod:`~metamask_plugin.modules.encoders`: its ResNets have other stems, its ``vit_*`` other numbers of heads
for some methods. Here the ResNets are built as it builds them, and the others as the timm model that equals
them key for key; what timm does not have comes from solo-learn's own factories, where it is installed.
"""

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from timm.models import convnext, swin_transformer, vision_transformer
from torch import nn

from metamask_plugin.errors import UserError, check
from metamask_plugin.evaluation.encoder import AMBIGUOUS, BUILDERS, load_encoder
from metamask_plugin.modules.encoders import ENCODERS, build_encoder

__all__ = ["IN_TIMM", "NOT_IN_TIMM", "build_solo_encoder", "load_encoder", "solo_factories"]

SIZES = ("tiny", "small", "base", "large")
# timm's functions, not its names: solo-learn, once imported, puts its own networks under some of these
IN_TIMM: dict[str, Callable[..., nn.Module]] = {
    **{f"vit_{size}": getattr(vision_transformer, f"vit_{size}_patch16_224") for size in SIZES},
    **{f"swin_{size}": getattr(swin_transformer, f"swin_{size}_patch4_window7_224") for size in SIZES},
    **{f"convnext_{size}": getattr(convnext, f"convnext_{size}") for size in SIZES},
}
"""timm's constructor of the same network, by solo-learn's name."""

NOT_IN_TIMM = (
    *(f"poolformer_{size}" for size in ("s12", "s24", "s36", "m36", "m48")),
    "wide_resnet28w2",
    "wide_resnet28w8",
)
"""Its own; timm's models of such names have other weights."""

OWN_VIT = ("mocov3", "mae")
"""Methods that come with a ViT of their own: 12 heads, ``vit_large`` 16; the same keys and shapes."""

DEFAULT_SIZE = 32
"""Side in pixels for which ``conv4``, ``conv`` and ``fc`` are built under solo-learn, which names none."""


def solo_factories() -> Mapping[str, Callable[..., nn.Module]]:
    """solo-learn's factories by backbone name, ``factory(method, **kwargs)``; empty where it is not there.

    Imports solo-learn, so it is called only where a checkpoint needs it.
    """
    if importlib.util.find_spec("solo") is None:
        return {}
    try:
        from solo import backbones
    except Exception as error:  # whatever breaks another package's import is a reason, not our crash
        warnings.warn(f"solo-learn's backbones are not used: {type(error).__name__}: {error}", stacklevel=2)
        return {}
    return {name: getattr(backbones, name) for name in backbones.__all__}


def build_solo_encoder(
    name: str, image_size: int, method: str | None, small_stem: bool, kwargs: Mapping[str, Any]
) -> nn.Module:
    """Builds the network that solo-learn, as the host, calls ``name``; random weights.

    Args:
        name: ``backbone.name`` of the training.
        image_size: of no effect, as solo-learn does not tell it to its factories.
        method: its ``method``, on which solo-learn's ViTs depend.
        small_stem: for ResNets, whether the first convolution is 3x3, which solo-learn makes it for
            CIFAR-10 and CIFAR-100 alone, whatever the size of the images.
        kwargs: its ``backbone.kwargs``.

    Returns:
        A module from images (N, 3, s, s) to features (N, ``num_features``).

    Raises:
        UserError: for a name or arguments without a network, or where solo-learn is needed to build it.

    Example:
        >>> network = build_solo_encoder("resnet18", 32, "byol", small_stem=True, kwargs={})
        >>> network.conv1.padding  # ours has (1, 1)
        (2, 2)
    """
    kwargs = dict(kwargs)
    if name in AMBIGUOUS:
        kwargs.setdefault("stem", "solo_cifar" if small_stem else "imagenet")
        return build_encoder(name, DEFAULT_SIZE, **kwargs)
    if name in ENCODERS:
        return build_encoder(name, kwargs.pop("image_size", DEFAULT_SIZE), **kwargs)
    if name.startswith("vit_"):
        remedy = "main_linear.py: pretrain_method"
        check(method is not None, "method", f"given, as solo-learn's {name} depends on it", None, remedy)
    own = solo_factories()
    try:
        if name in own:
            return own[name](method, **kwargs)
        if name in IN_TIMM:
            heads = 16 if name == "vit_large" else 12
            own_vit = {"num_heads": heads} if name.startswith("vit_") and method in OWN_VIT else {}
            return IN_TIMM[name](**{"num_classes": 0, **own_vit, **kwargs})
    except TypeError as error:
        raise UserError(f"backbone.kwargs do not fit solo-learn's {name!r}: {error}") from error
    check(
        name not in NOT_IN_TIMM,
        f"solo-learn for backbone.name={name!r}",
        "importable, as this network is its own",
        "an environment without it",
        "put a clone of it on PYTHONPATH",
    )
    return build_encoder(name, kwargs.pop("image_size", DEFAULT_SIZE), **kwargs)


BUILDERS["solo"] = build_solo_encoder
