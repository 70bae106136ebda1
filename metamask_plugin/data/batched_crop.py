"""Random resized crop of a whole batch as two small matrix products.

Cropping and resizing are linear and separable, so each image's crop is ``R_y x R_xᵀ`` with one resampling
matrix an axis. The matrices are filled in for all images at once, and hold Pillow's antialiased bicubic
filter, which is what torchvision uses on workers. kornia's ``slice`` mode loops over the images instead, its
``resample`` mode neither antialiases nor uses Pillow's kernel.
"""

import math

import torch
from torch import Tensor, nn

# width / height of the crop, torchvision's defaults
ASPECT = (3 / 4, 4 / 3)
# candidates tried before the crop falls back to the centre, as in torchvision
TRIES = 10


class BatchedResizedCrop(nn.Module):
    """torchvision's ``RandomResizedCrop(size, scale, interpolation=BICUBIC)``, another crop for each image.

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
