"""Views of an image: drawn one image at a time on workers, or a batch at a time on the device."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from kornia import __version__ as kornia_version
from kornia import augmentation as kornia
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

from metamask_plugin.data.augmentations import Augmentation, parse_augmentations
from metamask_plugin.data.batched_crop import BatchedResizedCrop
from metamask_plugin.data.splits import centre_square

KORNIA = tuple(int(part) for part in kornia_version.split(".")[:2])
# Standard deviation in pixels, drawn uniformly: SimCLR's, and the only one solo-learn knows.
BLUR_SIGMA = (0.1, 2.0)


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
