"""solo-learn itself as the host, with our encoders beside its own."""

from functools import partial

from solo.methods import METHODS
from solo.methods.base import BaseMethod
from torch import nn

from metamask_plugin.modules.encoders import ENCODERS, build_encoder


def _encoder_for_solo(name: str, method: str, image_size: int = 32, **kwargs):
    """solo-learn calls ``factory(method, **backbone.kwargs)`` and does not say the image size."""
    return build_encoder(name, image_size, **kwargs)


def release_kwargs(name: str, image_size: int) -> dict[str, str]:
    """solo-learn's ResNets have no such stem, and stay as they are."""
    return {}


def put_backbone(name: str, backbone: nn.Module) -> None:
    """Makes ``backbone.name: <name>`` mean this very module."""
    BaseMethod._BACKBONES[name] = lambda method: backbone


for _name in ENCODERS:
    BaseMethod._BACKBONES.setdefault(_name, partial(_encoder_for_solo, _name))

__all__ = ["METHODS", "BaseMethod", "put_backbone", "release_kwargs"]
