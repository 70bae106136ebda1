"""Encoders ``f_theta``: images (N, 3, H, W) to features (N, D).

Every encoder built here has an integer attribute ``num_features`` (D). Ours are registered by
name in :data:`ENCODERS`; any other name is looked up in timm. Where an encoder may be cut at its
feature map it has timm's ``forward_features`` and ``forward_head``, see
:mod:`~metamask_plugin.modules.encoder_split`.
"""

from collections.abc import Callable

import timm
import torch
import torchvision
from torch import nn

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.modules.timm_networks import timm_network

STEMS = ("auto", "cifar", "small", "imagenet", "solo_cifar", "release")
NORMS = {"batch": nn.BatchNorm2d, "group": lambda channels: nn.GroupNorm(8, channels)}


def _conv_norm_relu(
    channels_in: int, channels_out: int, kernel: int, stride: int = 1, norm: str = "batch"
) -> list[nn.Module]:
    return [
        nn.Conv2d(channels_in, channels_out, kernel, stride, padding=kernel // 2, bias=False),
        NORMS[norm](channels_out),
        nn.ReLU(inplace=True),
    ]


class _Convolutional(nn.Module):
    """Convolutions ``layers`` and global average pooling."""

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)

    def forward_head(self, feature_map: torch.Tensor) -> torch.Tensor:
        return feature_map.mean(dim=(2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean(dim=(2, 3))


class Conv4(_Convolutional):
    """Four strided 3x3 convolutions: small enough to train in minutes on two cores.

    Args:
        image_size: side of the square input, pixels; unused, all sizes from 16 work.
        width: channels of the first layer; each next one doubles them, D = 8 * width.
        norm: ``batch``, or ``group`` (8 groups), with which an image's features do not depend on the
            rest of its batch.
    """

    def __init__(self, image_size: int = 32, width: int = 32, norm: str = "batch"):
        super().__init__()
        choose("conv4's norm", norm, NORMS)
        if norm == "group":
            check(width % 8 == 0, "conv4's width", "a multiple of 8 for norm='group'", width)
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        layers = []
        for c_in, c_out in zip(widths, widths[1:]):
            layers += _conv_norm_relu(c_in, c_out, kernel=3, stride=2, norm=norm)
        self.layers = nn.Sequential(*layers)
        self.num_features = widths[-1]


class AlexNetConv(_Convolutional):
    """The five convolutions of AlexNet for small images: the papers' ``conv`` encoder.

    The papers name it and give no sizes. Chosen here: AlexNet's widths (64, 192, 384, 256, 256),
    BatchNorm after each convolution, a first kernel of 5 whose stride (2 up to 48 pixels, 4 above)
    leaves a 4x4 map at both 32 and 64 pixels, and global average pooling (D = 256).

    Args:
        image_size: side of the square input, pixels (32 to 96).

    [0] Krizhevsky et al., *ImageNet Classification with Deep CNNs*, NeurIPS 2012.
    [1] Li et al., *MetaMask*, NeurIPS 2022, Section 6.1.
    """

    def __init__(self, image_size: int = 32):
        super().__init__()
        pool = nn.MaxPool2d(2)
        self.layers = nn.Sequential(
            *_conv_norm_relu(3, 64, kernel=5, stride=2 if image_size <= 48 else 4),
            pool,
            *_conv_norm_relu(64, 192, kernel=5),
            pool,
            *_conv_norm_relu(192, 384, kernel=3),
            *_conv_norm_relu(384, 256, kernel=3),
            *_conv_norm_relu(256, 256, kernel=3),
        )
        self.num_features = 256


class AlexNetFC(nn.Module):
    """:class:`AlexNetConv` with two fully connected layers on its 4x4 map: the papers' ``fc``.

    Args:
        image_size: side of the square input, pixels (32 to 96).
        fc_dim: width of both layers, and D.

    [0] Li et al., *MetaMask*, NeurIPS 2022, Section 6.1.
    """

    def __init__(self, image_size: int = 32, fc_dim: int = 1024):
        super().__init__()
        self.conv = AlexNetConv(image_size)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.fc = nn.Sequential(
            nn.Linear(256 * 16, fc_dim, bias=False),
            nn.BatchNorm1d(fc_dim),
            nn.ReLU(inplace=True),
            nn.Linear(fc_dim, fc_dim, bias=False),
            nn.BatchNorm1d(fc_dim),
            nn.ReLU(inplace=True),
        )
        self.num_features = fc_dim

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv.forward_features(x)

    def forward_head(self, feature_map: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(feature_map).flatten(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))


def _resnet(constructor: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def build(image_size: int = 224, stem: str = "auto", **kwargs) -> nn.Module:
        """A torchvision ResNet without its classifier, and with a stem that fits the image.

        Args:
            image_size: side of the square input, pixels; decides the ``auto`` stem.
            stem: ``cifar`` (3x3, stride 1, no pooling: up to 32 pixels), ``small`` (3x3, stride 1,
                pooling kept: up to 96 pixels, as in the W-MSE code base that ICL-MSR follows),
                ``imagenet`` (7x7, stride 2, pooling), or ``auto``; ``solo_cifar`` is ``cifar`` with
                the convolution padded by 2, as solo-learn builds it (34x34 from 32x32); ``release`` is
                ``cifar`` as MetaMask's release has it: without the ReLU behind the stem's BatchNorm, which
                its ``nn.Sequential`` of a ResNet's children leaves out, and with torch's initial weights.
        """
        choose("backbone.kwargs.stem", stem, STEMS)
        if stem == "auto":
            stem = "cifar" if image_size <= 32 else "small" if image_size <= 96 else "imagenet"
        network = constructor(weights=None, **kwargs)
        network.num_features = network.fc.in_features
        network.fc = nn.Identity()
        if stem != "imagenet":
            padding = 2 if stem == "solo_cifar" else 1
            network.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=padding, bias=False)
        if stem in ("cifar", "solo_cifar", "release"):
            network.maxpool = nn.Identity()
        if stem == "release":
            network.relu = nn.Identity()  # the stem's; each block has its own
            for module in network.modules():
                if isinstance(module, nn.Conv2d):  # torchvision draws from He's normal distribution
                    module.reset_parameters()
        return network

    return build


ENCODERS: dict[str, Callable[..., nn.Module]] = {
    "conv4": Conv4,
    "conv": AlexNetConv,
    "fc": AlexNetFC,
    "resnet18": _resnet(torchvision.models.resnet18),
    "resnet50": _resnet(torchvision.models.resnet50),
}


def release_kwargs(name: str, image_size: int) -> dict[str, str]:
    """``backbone.kwargs`` that make an encoder MetaMask's release's: of our ResNets, at its 32 pixels.

    Example:
        >>> release_kwargs("resnet18", 32), release_kwargs("resnet18", 224)
        ({'stem': 'release'}, {})
    """
    return {"stem": "release"} if name in ("resnet18", "resnet50") and image_size <= 32 else {}


def build_encoder(name: str, image_size: int, setting: str = "backbone", **kwargs) -> nn.Module:
    """Builds an encoder by name, ours first, then timm's (without a classifier, random weights).

    Args:
        name: a key of :data:`ENCODERS`, or any name in ``timm.list_models()``.
        image_size: side of the square input, pixels.
        setting: the config block that names the encoder, for messages.
        kwargs: passed on to the constructor.

    Returns:
        A module from (N, 3, image_size, image_size) to (N, ``num_features``).

    Raises:
        UserError: for an unknown name, and for arguments that the constructor refuses or that name files.

    Example:
        >>> encoder = build_encoder("resnet18", image_size=32)
        >>> encoder(torch.zeros(2, 3, 32, 32)).shape, encoder.num_features
        (torch.Size([2, 512]), 512)
    """
    check(image_size >= 16, f"{setting}'s crop_size", ">= 16 pixels", image_size)
    try:
        if name in ENCODERS:
            return ENCODERS[name](image_size=image_size, **kwargs)
        if timm.is_model(name):
            return timm_network(name, image_size, setting, **kwargs)
    except TypeError as error:
        raise UserError(f"{setting}.kwargs do not fit {setting}.name={name!r}: {error}") from error
    like = timm.list_models(f"{name}*") or timm.list_models(f"{name[:4]}*")
    choose(f"{setting}.name", name, [*ENCODERS, *like[:12], "any timm model"])
    raise AssertionError("unreachable")


def feature_std(feats: torch.Tensor) -> torch.Tensor:
    """sqrt(D) times the mean standard deviation of a dimension, of features of unit length; a scalar.

    As SimSiam [0] measures it: 0 when all images have the same features, 1 when they are spread over the
    sphere in all directions. Features behind a ReLU are all positive and stay below.

    Args:
        feats: shape (N, D).

    [0] Chen and He, *Exploring Simple Siamese Representation Learning*, CVPR 2021, Section 4.1.
    """
    directions = nn.functional.normalize(feats, dim=1)
    return directions.std(dim=0, unbiased=False).mean() * feats.shape[1] ** 0.5
