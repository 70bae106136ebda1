"""Views of an image: drawn one image at a time on workers, or a batch at a time on the device."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from kornia import __version__ as kornia_version
from kornia import augmentation as kornia
from omegaconf import DictConfig, ListConfig, OmegaConf
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from metamask_plugin.config.read import read
from metamask_plugin.config.views import View
from metamask_plugin.data.images import centre_square
from metamask_plugin.errors import check

KORNIA = tuple(int(part) for part in kornia_version.split(".")[:2])
# Standard deviation in pixels, drawn uniformly: SimCLR's, and the only one solo-learn knows.
BLUR_SIGMA = (0.1, 2.0)
# Width / height of a random crop, and candidates tried before it falls back to the centre: torchvision's.
ASPECT = (3 / 4, 4 / 3)
TRIES = 10


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


class TorchvisionViews:
    """Draws an image's views with torchvision on PIL images: solo-learn's operations in solo-learn's order.

    One difference: where random cropping is off, the resized image's centre square is taken, so that images
    that are not square make a batch.

    Args:
        augmentations: solo-learn's list, see :func:`parse_augmentations`.
        mean: per channel, for images in [0, 1].
        std: per channel.

    Raises:
        UserError: an unknown key, or a value out of its range.
    """

    def __init__(
        self, augmentations: Iterable[Mapping[str, Any]], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.pipelines = [
            (entry.num_crops, _pil_pipeline(entry, mean, std)) for entry in parse_augmentations(augmentations)
        ]

    def __call__(self, image: Image.Image) -> list[Tensor]:
        """The views, float32, each of shape (3, s, s), s the crop size of its entry in the list."""
        return [pipeline(image) for count, pipeline in self.pipelines for _ in range(count)]


class KorniaViews(nn.Module):
    """Draws the views of a whole batch on its device, distributed as those of :class:`TorchvisionViews`.

    What remains different: values, and hues, are not rounded to 1/255 between operations; the blur is a
    Gaussian cut off at :func:`blur_kernel`, not Pillow's repeated boxes; and the four parts of the colour
    jitter come in one random order a view and batch, not an image. Everything is drawn on the CPU, wherever
    the images are: a seed means the same draws on every device.

    Args:
        augmentations: solo-learn's list, see :func:`parse_augmentations`.
        mean: per channel, for images in [0, 1].
        std: per channel.

    Raises:
        UserError: an unknown key, or a value out of its range.
    """

    def __init__(
        self, augmentations: Iterable[Mapping[str, Any]], mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        entries = parse_augmentations(augmentations)
        self.counts = [entry.num_crops for entry in entries]
        self.pipelines = nn.ModuleList(_batch_pipeline(entry) for entry in entries)
        self.mean, self.std = (torch.tensor(list(values)).view(-1, 1, 1) for values in (mean, std))

    @torch.no_grad()
    def forward(self, images: Tensor) -> list[Tensor]:
        """The views of uint8 images of shape (B, 3, H, W): float32, each of shape (B, 3, s, s)."""
        if self.mean.device != images.device:
            # The pipelines stay: moved to a GPU, kornia draws there, and then waits for what it has drawn.
            self.mean, self.std = self.mean.to(images.device), self.std.to(images.device)
        # Reduced precision would cost colours, and there is little to win.
        with torch.autocast(images.device.type, enabled=False):
            pixels = images.float() / 255
            return [
                (pipeline(pixels) - self.mean) / self.std
                for count, pipeline in zip(self.counts, self.pipelines, strict=True)
                for _ in range(count)
            ]


class EvaluationView:
    """The view for evaluation: shorter side resized (bicubic), centre square, normalised.

    Args:
        crop_size: height and width in pixels.
        mean: per channel, for images in [0, 1].
        std: per channel.
        resize: pixels of the resized shorter side; ``crop_size`` by default, which shows all of it.
    """

    def __init__(
        self, crop_size: int, mean: Sequence[float], std: Sequence[float], resize: int | None = None
    ) -> None:
        self.crop_size = crop_size
        self.resize = resize or crop_size
        self.mean = list(mean)
        self.std = list(std)

    def __call__(self, images: Image.Image | Tensor) -> Tensor:
        """The view, float32, (3, s, s) of a PIL image or (B, 3, s, s) of uint8 images (B, 3, H, W)."""
        if isinstance(images, Tensor):
            pixels = square_batch(images, self.crop_size, self.resize).float() / 255
        else:
            pixels = vision.to_tensor(centre_square(images, self.crop_size, self.resize))
        return vision.normalize(pixels, self.mean, self.std)


def square_batch(images: Tensor, size: int, resize: int | None = None) -> Tensor:
    """:func:`centre_square` for a batch of uint8 or float images in memory."""
    resize = resize or size
    if min(images.shape[-2:]) != resize:
        images = vision.resize(images, resize, InterpolationMode.BICUBIC, antialias=True)
    return vision.center_crop(images, [size, size])


def blur_kernel(crop_size: int) -> int:
    """Taps of the blur filter: about 10 % of the crop, odd, and never too few for the largest sigma.

    10 % is SimCLR's rule for 224 pixels. At 32 pixels it would give 3 taps, which cut the Gaussian off so
    early that a sigma of 2 blurs like one of 0.8; Pillow does not cut, so three sigma to either side are the
    least.
    """
    least = 2 * round(3 * BLUR_SIGMA[1]) + 1
    return max(round(0.1 * crop_size) // 2 * 2 + 1, least)


class _PilBlur:
    """Pillow's Gaussian blur with a random sigma, from torch's generator, which workers seed."""

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = torch.empty(1).uniform_(*BLUR_SIGMA).item()
        return image.filter(ImageFilter.GaussianBlur(sigma))


class _CentreSquare:
    """A class, not a lambda: it has to reach workers that are spawned."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return centre_square(image, self.size)


def _pil_pipeline(entry: Augmentation, mean: Sequence[float], std: Sequence[float]) -> transforms.Compose:
    steps: list[Callable]
    if entry.crop_scale:
        steps = [transforms.RandomResizedCrop(entry.crop_size, entry.crop_scale, interpolation=_BICUBIC)]
    else:
        steps = [_CentreSquare(entry.crop_size)]
    jitter = transforms.ColorJitter(entry.brightness, entry.contrast, entry.saturation, entry.hue)
    for probability, operation in (
        (entry.color_jitter, jitter),
        (entry.grayscale, transforms.Grayscale(3)),
        (entry.gaussian_blur, _PilBlur()),
        (entry.solarization, ImageOps.solarize),
        (entry.equalization, ImageOps.equalize),
        (entry.horizontal_flip, ImageOps.mirror),
    ):
        if probability:
            steps.append(transforms.RandomApply([operation], probability))
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])


_BICUBIC = InterpolationMode.BICUBIC


class _Contiguous(nn.Module):
    """Before kornia 0.9 (the newest for Python 3.10 is older) its blur fails on images laid out otherwise."""

    def forward(self, images: Tensor) -> Tensor:
        return images.contiguous()


class _SquareBatch(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        # Bicubic overshoots where it resizes; Pillow clips.
        return square_batch(images, self.size).clamp(0, 1)


def _batch_pipeline(entry: Augmentation) -> nn.Sequential:
    strengths = (entry.brightness, entry.contrast, entry.saturation, entry.hue)
    taps = blur_kernel(entry.crop_size)
    steps: list[nn.Module] = [
        BatchedResizedCrop(entry.crop_size, entry.crop_scale)
        if entry.crop_scale
        else _SquareBatch(entry.crop_size)
    ]
    # ColorJitter, not ColorJiggle, is torchvision's; the default solarisation draws threshold and addition;
    # Pillow's blur continues the border pixel.
    if entry.color_jitter:
        steps.append(kornia.ColorJitter(*strengths, p=entry.color_jitter))
    if entry.grayscale:
        steps.append(kornia.RandomGrayscale(p=entry.grayscale))
    if entry.gaussian_blur:
        if KORNIA < (0, 9):
            steps.append(_Contiguous())
        steps.append(
            kornia.RandomGaussianBlur(
                (taps, taps), BLUR_SIGMA, border_type="replicate", p=entry.gaussian_blur
            )
        )
    if entry.solarization:
        steps.append(kornia.RandomSolarize((0.5, 0.5), (0.0, 0.0), p=entry.solarization))
    if entry.equalization:
        steps.append(kornia.RandomEqualize(p=entry.equalization))
    if entry.horizontal_flip:
        steps.append(kornia.RandomHorizontalFlip(p=entry.horizontal_flip))
    return nn.Sequential(*steps)


class BatchedResizedCrop(nn.Module):
    """torchvision's ``RandomResizedCrop(size, scale, interpolation=BICUBIC)``, another crop for each image.

    Cropping and resizing are linear and separable, so each image's crop is ``R_y x R_xᵀ`` with one resampling
    matrix an axis. The matrices are filled in for all images at once, and hold Pillow's antialiased bicubic
    filter, which is what torchvision uses on workers. kornia's ``slice`` mode loops over the images instead,
    its ``resample`` mode neither antialiases nor uses Pillow's kernel.

    Args:
        size: height and width of the result in pixels.
        scale: smallest and largest share of the area that is kept.
    """

    def __init__(self, size: int, scale: tuple[float, float]) -> None:
        super().__init__()
        self.size = size
        self.scale = scale

    def forward(self, images: Tensor) -> Tensor:
        """Crops float images in [0, 1] of shape (B, 3, H, W) to (B, 3, size, size), again in [0, 1]."""
        height, width = images.shape[-2:]
        windows = sample_crops(len(images), height, width, self.scale)
        # Without waiting, so that views are queued while the GPU is still busy with the previous batch.
        top, left, rows, columns = windows.to(images.device, non_blocking=True).unbind(1)
        along_x = resampling_matrix(left, columns, width, self.size)[:, None]
        along_y = resampling_matrix(top, rows, height, self.size)[:, None]
        # Bicubic overshoots at edges; Pillow clips after each of the two passes.
        narrowed = (images @ along_x.mT).clamp(0, 1)
        return (along_y @ narrowed).clamp(0, 1)


def sample_crops(count: int, height: int, width: int, scale: tuple[float, float]) -> Tensor:
    """Crop windows distributed as torchvision's, int64, columns top, left, height, width, shape (count, 4).

    Always drawn on the CPU, so that a seed gives the same crops on every device.
    """
    area = height * width * torch.empty(count, TRIES).uniform_(*scale)
    aspect = torch.empty(count, TRIES).uniform_(math.log(ASPECT[0]), math.log(ASPECT[1])).exp()
    columns, rows = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (columns > 0) & (columns <= width) & (rows > 0) & (rows <= height)
    first = fits.int().argmax(1, keepdim=True)
    columns, rows = columns.gather(1, first)[:, 0], rows.gather(1, first)[:, 0]
    found = fits.any(1)
    # Without a fitting candidate: the largest centred window of an allowed aspect.
    whole_columns = min(width, round(height * ASPECT[1]))
    whole_rows = min(height, round(width / ASPECT[0]))
    columns = torch.where(found, columns, whole_columns)
    rows = torch.where(found, rows, whole_rows)
    top = torch.where(found, (torch.rand(count) * (height - rows + 1)).long(), (height - rows) // 2)
    left = torch.where(found, (torch.rand(count) * (width - columns + 1)).long(), (width - columns) // 2)
    return torch.stack([top, left, rows, columns], 1)


def resampling_matrix(start: Tensor, length: Tensor, inputs: int, outputs: int) -> Tensor:
    """Weights that take a window of a line of pixels to ``outputs`` pixels with Pillow's bicubic filter.

    Output ``k`` sees the window at ``(k + 1/2) · length / outputs``; pixels outside the window have weight 0,
    and when the window shrinks the filter widens by the same factor (antialiasing).

    Args:
        start: first pixel of each window, shape (B,).
        length: pixels in each window, shape (B,).
        inputs: pixels in the line.
        outputs: pixels wanted.

    Returns:
        shape (B, outputs, inputs), rows sum to 1.
    """
    pixel = torch.arange(inputs, device=start.device) - start[:, None, None]
    step = (length / outputs)[:, None, None]
    centre = (torch.arange(outputs, device=start.device)[:, None] + 0.5) * step
    weights = _cubic((pixel + 0.5 - centre) / step.clamp(min=1))
    weights = weights * ((pixel >= 0) & (pixel < length[:, None, None]))
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' cubic convolution kernel with a = -1/2, Pillow's choice (torch's plain ``bicubic`` has -3/4)."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
