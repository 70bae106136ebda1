"""An encoder cut at its feature map: what comes before the pooling, and what comes behind."""

import torch
from torch import nn
from torchvision.models import ResNet

from metamask_plugin.errors import UserError, check


class Front(nn.Module):
    """Images (N, 3, H, W) to the feature map (N, C, h, w). Shares the encoder, holds nothing itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.network, ResNet):
            return self.network.forward_features(x)
        for name in ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"):
            x = getattr(self.network, name)(x)
        return x


class Tail(nn.Module):
    """The feature map (N, C, h, w) to features (N, D). Shares the encoder, holds nothing itself."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, feature_map: torch.Tensor) -> torch.Tensor:
        if not isinstance(self.network, ResNet):
            return self.network.forward_head(feature_map)
        return self.network.fc(self.network.avgpool(feature_map).flatten(1))


class EncoderSplit:
    """The two parts of a convolutional encoder, one after the other the encoder itself.

    Works for torchvision's ResNets, whichever host built them, and for what has ``forward_features``
    and ``forward_head``: our own encoders and timm's. Not a module, so that whoever keeps one does
    not list the encoder's weights twice.

    Args:
        network: the encoder.
        image_size: side of the square input, pixels.

    Attributes:
        front: images to map.
        tail: map to features.
        channels: C, of the map.
        front_names: parameters of :attr:`front` that it uses, by its names.
        tail_names: parameters of :attr:`tail` that it uses, by its names.

    Raises:
        UserError: for an encoder that cannot be cut, or whose map is not (N, C, h, w).

    Example:
        >>> from torchvision.models import resnet18
        >>> split = EncoderSplit(resnet18(), image_size=64)
        >>> feature_map = split.front(torch.zeros(2, 3, 64, 64))
        >>> feature_map.shape, split.tail(feature_map).shape
        (torch.Size([2, 512, 2, 2]), torch.Size([2, 1000]))
    """

    def __init__(self, network: nn.Module, image_size: int):
        kind = type(network).__name__
        cuttable = isinstance(network, ResNet) or (
            hasattr(network, "forward_features") and hasattr(network, "forward_head")
        )
        if not cuttable or getattr(network, "output_fmt", "NCHW") != "NCHW":
            raise self._refusal(kind)
        self.front, self.tail = Front(network), Tail(network)
        training = [(module, module.training) for module in network.modules()]
        network.eval()  # a look, which leaves BatchNorm's statistics and the random state alone
        try:
            self._look(network, image_size, kind)
        finally:
            for module, flag in training:
                module.training = flag

    def _look(self, network: nn.Module, image_size: int, kind: str) -> None:
        parameter = next(network.parameters())
        x = torch.linspace(-1, 1, 3 * image_size * image_size, device=parameter.device, dtype=parameter.dtype)
        x = x.view(1, 3, image_size, image_size)
        feature_map = self.front(x).detach()
        if feature_map.dim() != 4:
            raise self._refusal(kind)
        feats = self.tail(feature_map)
        same = torch.allclose(feats.detach(), network(x).detach(), rtol=1e-3, atol=1e-4)
        check(same, f"encoder {kind}", "its forward_features and forward_head in a row", "another output")
        self.channels: int = feature_map.shape[1]
        self.tail_names = self._used(feats)
        self.front_names = {name for name, _ in self.front.named_parameters()} - self.tail_names

    def _used(self, feats: torch.Tensor) -> set[str]:
        names, parameters = zip(*[item for item in self.tail.named_parameters() if item[1].requires_grad])
        if not feats.requires_grad:  # nothing behind the map has parameters
            return set()
        gradients = torch.autograd.grad(feats.sum(), parameters, allow_unused=True)
        return {name for name, gradient in zip(names, gradients) if gradient is not None}

    @staticmethod
    def _refusal(kind: str) -> UserError:
        return UserError(
            f"method_kwargs.level=feature_map needs an encoder with a feature map (N, C, h, w), got {kind}; "
            "set method_kwargs.level=features"
        )
