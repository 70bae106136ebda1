"""solo-learn's ``augmentations`` list, read once, checked, with its defaults filled in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from metamask_plugin.config.read import read
from metamask_plugin.config.views import View
from metamask_plugin.errors import check


@dataclass(frozen=True)
class Augmentation:
    """One entry of the list: how ``num_crops`` views of an image are made.

    Attributes:
        crop_size: height and width of the views in pixels.
        num_crops: views made by this entry.
        crop_scale: smallest and largest share of the image's area that a random resized crop keeps; None
            resizes the whole image, as does a crop that keeps all of it.
        color_jitter: probability.
        brightness: strength, as are contrast and saturation, at least 0.
        contrast: strength.
        saturation: strength.
        hue: strength in turns, 0 to 0.5.
        grayscale: probability, as are the rest.
        gaussian_blur: probability.
        solarization: probability.
        equalization: probability.
        horizontal_flip: probability.
    """

    crop_size: int
    num_crops: int = 1
    crop_scale: tuple[float, float] | None = None
    color_jitter: float = 0.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    gaussian_blur: float = 0.0
    solarization: float = 0.0
    equalization: float = 0.0
    horizontal_flip: float = 0.0


def parse_augmentations(nodes: Iterable[Mapping[str, Any]] | ListConfig) -> list[Augmentation]:
    """Reads the configuration's ``augmentations``.

    Args:
        nodes: the list, plain or of OmegaConf; entries that are :class:`Augmentation` already stay as they
            are.

    Raises:
        UserError: an unknown key, or a value out of its range.
    """
    if isinstance(nodes, ListConfig | DictConfig):
        nodes = OmegaConf.to_container(nodes, resolve=True)
    check(
        isinstance(nodes, list | tuple) and len(nodes) > 0,
        "augmentations",
        "a list with at least one entry",
        nodes,
        "compose one of the augmentations/*.yaml",
    )
    return [
        node if isinstance(node, Augmentation) else _parse(node, f"augmentations.{i}")
        for i, node in enumerate(nodes)
    ]


def _parse(node: Any, name: str) -> Augmentation:
    check(isinstance(node, Mapping), name, "a mapping with crop_size and num_crops", node)
    view = read(View, node, name)
    rrc, jitter = view["rrc"], view["color_jitter"]
    scale = (rrc["crop_min_scale"], rrc["crop_max_scale"])
    chances = ("grayscale", "gaussian_blur", "solarization", "equalization", "horizontal_flip")
    return Augmentation(
        crop_size=view["crop_size"],
        num_crops=view["num_crops"],
        crop_scale=scale if rrc["enabled"] and scale != (1, 1) else None,
        color_jitter=jitter["prob"],
        **{strength: jitter[strength] for strength in ("brightness", "contrast", "saturation", "hue")},
        **{chance: view[chance]["prob"] for chance in chances},
    )
