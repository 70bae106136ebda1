"""scikit-learn's bundled handwritten digits: nothing to download."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from metamask_plugin.data.splits import MemoryImages
from metamask_plugin.errors import check

CLASSES = [str(digit) for digit in range(10)]
TEST_IMAGES = 500
# One fixed cut, so that accuracies of different runs and seeds speak of the same test images.
CUT_SEED = 0


def raw_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The 1,797 digits [0], cut once and for all into 1,297 for training and 500 for test, stratified.

    Returns:
        (ink, labels) of the training digits and of the test digits; ink in [0, 1], float32, shape (N, 8, 8).

    [0] E. Alpaydin, C. Kaynak, Optical recognition of handwritten digits, UCI Machine Learning Repository,
    1998
    """
    ink, labels = load_digits(return_X_y=True)
    cut = train_test_split(ink, labels, test_size=TEST_IMAGES, stratify=labels, random_state=CUT_SEED)
    train_ink, test_ink = (torch.from_numpy(part).float().reshape(-1, 8, 8) / 16 for part in cut[:2])
    train_labels, test_labels = (torch.from_numpy(part).long() for part in cut[2:])
    return (train_ink, train_labels), (test_ink, test_labels)


def digits(size: int = 32) -> tuple[MemoryImages, MemoryImages]:
    """Training and test split of the digits, white on black, as RGB.

    Args:
        size: height and width in pixels, at least 8; the 8x8 originals are upscaled bilinearly.

    Raises:
        UserError: ``size`` is not a whole number of at least 8.
    """
    check(
        isinstance(size, int) and size >= 8, "data.kwargs.size", "a whole number of at least 8 (pixels)", size
    )
    train, test = raw_digits()
    return _as_images(*train, size), _as_images(*test, size)


def _as_images(ink: Tensor, labels: Tensor, size: int) -> MemoryImages:
    grey = F.interpolate(ink[:, None], (size, size), mode="bilinear", align_corners=False)
    images = (grey * 255).round().to(torch.uint8).repeat(1, 3, 1, 1)
    return MemoryImages(images, labels, CLASSES)
