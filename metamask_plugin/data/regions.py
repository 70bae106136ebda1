"""Foreground and background of images whose foreground boxes are known.

ICL-MSR trains and tests on either, Figs. 1 and 4: "the area inside the bounding box as the foreground, and
the area outside as the background" (Qiang et al., ICML 2022, Section 6.2).
"""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from metamask_plugin.data.images import centre_square
from metamask_plugin.data.splits import Dataset, FileImages, ImageSplit, MemoryImages
from metamask_plugin.errors import check, choose

REGIONS = ("full", "foreground", "background")
FORMS = ("fill", "zoom")


def region_of(
    split: ImageSplit, region: str, fill: Sequence[float] = (0.5, 0.5, 0.5), form: str = "fill"
) -> ImageSplit:
    """The same images, of which only the foreground or only the background is to be seen.

    Args:
        split: images with ``boxes``.
        region: ``full`` returns ``split`` itself; ``foreground`` keeps what lies inside the box,
            ``background`` what lies outside.
        fill: colour of what is removed, per channel, in [0, 1]; the data set's mean becomes 0 when the
            images are normalised.
        form: how a foreground is shown: ``fill`` leaves it in its place, ``zoom`` enlarges the box to the
            whole square (its longer side fills it, the rest is ``fill``). A background always keeps its
            place.

    Returns:
        A split of the same length, labels and classes, without boxes and masks.

    Raises:
        UserError: an unknown region or form, or a split without boxes.
    """
    choose("data.region", region, REGIONS)
    choose("data.region_form", form, FORMS)
    if region == "full":
        return split
    check(
        split.boxes is not None,
        "data.region",
        "full, as these images have no foreground boxes",
        region,
        "take confounded_digits, coco, or tiny_imagenet with its box files",
    )
    colour = tuple(round(255 * channel) for channel in fill)
    if not isinstance(split, MemoryImages):
        return _RegionFiles(split, region, colour, form)
    if region == "foreground" and form == "zoom":
        images = _zoomed(split, colour)
    else:
        images = _filled(split.images, split.boxes, region == "foreground", colour)
    changed = copy.copy(split)
    changed.images, changed.boxes, changed.masks = images, None, None
    return changed


def in_region(dataset: Dataset, region: str, form: str = "fill") -> Dataset:
    """A data set with the foregrounds or the backgrounds alone; what is removed turns the mean.

    Args:
        dataset: with full images.
        region: ``full``, ``foreground`` or ``background``, see :func:`region_of`.
        form: ``fill`` or ``zoom``, likewise.

    Raises:
        UserError: an unknown region or form, or a split without boxes.
    """
    splits = {name: region_of(split, region, dataset.mean, form) for name, split in dataset.splits.items()}
    return replace(dataset, **splits)


class _RegionFiles(FileImages):
    """Regions of images that are decoded when asked for."""

    def __init__(self, split: FileImages, region: str, colour: tuple[int, ...], form: str) -> None:
        super().__init__(split.paths, split.labels, split.classes)
        self.bits = split.bits
        # Not ``boxes``: what is left has none. A tensor still, so that subset() picks from it.
        self._box = split.boxes
        self._region, self._colour, self._form = region, colour, form

    def image(self, index: int) -> Image.Image:
        image, box = super().image(index), tuple(self._box[index].tolist())
        if self._region == "background":
            image.paste(self._colour, box)
            return image
        if self._form == "zoom":
            return _box_on_square(image, box, self._colour)
        return _box_in_place(image, box, self._colour)


def _filled(images: Tensor, boxes: Tensor, inside: bool, colour: tuple[int, ...]) -> Tensor:
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    columns, rows = torch.arange(images.shape[3]), torch.arange(images.shape[2])
    in_box = ((rows >= y0) & (rows < y1))[:, :, None] & ((columns >= x0) & (columns < x1))[:, None, :]
    keep = in_box if inside else ~in_box
    filling = torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1)
    return torch.where(keep[:, None], images, filling)


def _zoomed(split: MemoryImages, colour: tuple[int, ...]) -> Tensor:
    size = split.images.shape[-1]
    zoomed = torch.empty(len(split), 3, size, size, dtype=torch.uint8)
    for index, box in enumerate(split.boxes.tolist()):
        square = centre_square(_box_on_square(split.image(index), box, colour), size)
        zoomed[index] = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    return zoomed


def _box_in_place(image: Image.Image, box: Sequence[int], colour: tuple[int, ...]) -> Image.Image:
    canvas = Image.new("RGB", image.size, colour)
    canvas.paste(image.crop(box), box[:2])
    return canvas


def _box_on_square(image: Image.Image, box: Sequence[int], colour: tuple[int, ...]) -> Image.Image:
    width, height = box[2] - box[0], box[3] - box[1]
    side = max(width, height)
    canvas = Image.new("RGB", (side, side), colour)
    canvas.paste(image.crop(box), ((side - width) // 2, (side - height) // 2))
    return canvas
