"""solo-learn's ``augmentations`` list, read once, checked, with its defaults filled in."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from metamask_plugin.errors import check, choose

# What solo-learn's grammar knows, with the value that a missing key stands for: nothing is done to the image
# unless the configuration says so. mean and std are read where the images are normalised.
GRAMMAR = {
    "rrc": {"enabled": False, "crop_min_scale": 0.08, "crop_max_scale": 1.0},
    "color_jitter": {"prob": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0},
    "grayscale": {"prob": 0.0},
    "gaussian_blur": {"prob": 0.0},
    "solarization": {"prob": 0.0},
    "equalization": {"prob": 0.0},
    "horizontal_flip": {"prob": 0.0},
}
SCALARS = ("crop_size", "num_crops", "mean", "std")


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
        node if isinstance(node, Augmentation) else _parse(node, f"augmentations[{i}]")
        for i, node in enumerate(nodes)
    ]


def _parse(node: Any, name: str) -> Augmentation:
    check(isinstance(node, Mapping), name, "a mapping with crop_size and num_crops", node)
    for key in node:
        choose(f"{name} key", key, (*GRAMMAR, *SCALARS))
    values = {group: _group(node, group, f"{name}.{group}") for group in GRAMMAR}
    for count in ("crop_size", "num_crops"):
        value = node.get(count, 1 if count == "num_crops" else None)
        check(_is_whole(value) and value >= 1, f"{name}.{count}", "a whole number of at least 1", value)
    jitter, rrc = values["color_jitter"], values["rrc"]
    return Augmentation(
        crop_size=node["crop_size"],
        num_crops=node.get("num_crops", 1),
        crop_scale=_crop_scale(rrc),
        **{strength: jitter[strength] for strength in ("brightness", "contrast", "saturation", "hue")},
        **{group: values[group]["prob"] for group in GRAMMAR if group != "rrc"},
    )


def _group(node: Mapping[str, Any], group: str, name: str) -> dict[str, Any]:
    """One operation's settings, complete and within their ranges."""
    given = node.get(group) or {}
    check(isinstance(given, Mapping), name, f"a mapping with {', '.join(GRAMMAR[group])}", given)
    for key in given:
        choose(f"{name} key", key, GRAMMAR[group])
    values = {**GRAMMAR[group], **given}
    for key, value in values.items():
        setting = f"{name}.{key}"
        if key == "enabled":
            check(isinstance(value, bool), setting, "true or false", value)
            continue
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if key == "prob":
            check(number and 0 <= value <= 1, setting, "a probability between 0 and 1", value)
        elif key.startswith("crop"):
            check(number and 0 < value <= 1, setting, "a share of the area in (0, 1]", value)
        elif key == "hue":
            check(number and 0 <= value <= 0.5, setting, "between 0 and 0.5 (turns)", value)
        else:
            check(number and value >= 0, setting, "at least 0", value)
    if group == "rrc":
        low, high = values["crop_min_scale"], values["crop_max_scale"]
        check(low <= high, f"{name}.crop_min_scale", f"at most crop_max_scale ({high})", low)
    return values


def _crop_scale(rrc: dict[str, Any]) -> tuple[float, float] | None:
    scale = (rrc["crop_min_scale"], rrc["crop_max_scale"])
    return scale if rrc["enabled"] and scale != (1, 1) else None


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
