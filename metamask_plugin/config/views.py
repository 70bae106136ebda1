"""solo-learn's ``augmentations``: every key of an entry."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from metamask_plugin.config.fields import Block, Channels, Deviations, NonNegative, PositiveShare, Share, key
from metamask_plugin.errors import check

Turns = Annotated[float, Field(ge=0, le=0.5)]


class RandomResizedCrop(Block):
    """A part of the image, in another shape."""

    enabled: bool = key(False, "else the whole image is resized")
    crop_min_scale: PositiveShare = key(0.08, "smallest share of the area")
    crop_max_scale: PositiveShare = key(1.0, "largest share of the area")

    @model_validator(mode="after")
    def check_together(self) -> "RandomResizedCrop":
        low, high = self.crop_min_scale, self.crop_max_scale
        check(low <= high, "rrc.crop_min_scale", f"at most crop_max_scale ({high})", low)
        return self


class ColorJitter(Block):
    """Other colours."""

    prob: Share = key(0.0, "probability")
    brightness: NonNegative = key(0.0, "strength")
    contrast: NonNegative = key(0.0, "strength")
    saturation: NonNegative = key(0.0, "strength")
    hue: Turns = key(0.0, "strength, in turns")


class Chance(Block):
    """What is done to some of the images."""

    prob: Share = key(0.0, "probability")


class Appearance(Block):
    """What is done to a view: nothing, unless the config says so."""

    rrc: RandomResizedCrop = RandomResizedCrop()
    color_jitter: ColorJitter = ColorJitter()
    grayscale: Chance = Chance()
    gaussian_blur: Chance = Chance()
    solarization: Chance = Chance()
    equalization: Chance = Chance()
    horizontal_flip: Chance = Chance()
    mean: Channels | None = key(None, "per channel, where data.mean is not given")
    std: Deviations | None = key(None, "likewise")


class View(Appearance):
    """One entry: how ``num_crops`` views of an image are made."""

    crop_size: Annotated[int, Field(ge=1, le=8192)] = key(..., "side of the views, pixels")
    num_crops: Annotated[int, Field(ge=1, le=1000)] = key(1, "views")


class LinearView(Appearance):
    """``data.augmentations`` of ``main_linear.py``."""

    crop_size: Annotated[int, Field(ge=1, le=8192)] | None = key(None, "side of the images, pixels")


def count_views(entries: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Large and small crops of an image: solo-learn's rule is that the first entry's size is large.

    Args:
        entries: ``crop_size`` and ``num_crops`` of each.
    """
    large = sum(number for size, number in entries if size == entries[0][0])
    return large, sum(number for _, number in entries) - large
