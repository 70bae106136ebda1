"""Which part of an image an encoder sees, measured by a backward pass."""

import torch
from torch import nn

from metamask_plugin.errors import UserError

MOST_UNSEEN = 0.1
"""Share of an image's side that may stay unseen at a border, for an encoder without patches.

Strided convolutions and poolings without padding drop some pixels at some sizes, also in published networks.
"""

IMAGES = 2
"""Random images of the measurement: ReLU and max pooling hide other pixels of each."""


def unseen_border(encoder: nn.Module, side: int) -> int:
    """Width in pixels of the widest border strip that the features do not depend on.

    A pixel is seen if the gradient of a random projection of the features is not exactly zero there. The
    encoder's mode, its gradients and the random state stay as they are.

    Args:
        encoder: images (N, 3, side, side) to features (N, D).
        side: of the square images, pixels.

    Example:
        >>> patches = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.Flatten())  # 28 pixels hold one
        >>> unseen_border(patches, 28)
        12
    """
    reference = next(encoder.parameters(), torch.empty(()))
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(IMAGES, 3, side, side, generator=generator).to(reference).requires_grad_()
    training = [(module, module.training) for module in encoder.modules()]
    encoder.eval()
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            feats = encoder(images)
            weights = torch.randn(feats.shape, generator=generator).to(feats)
            (gradient,) = torch.autograd.grad(feats, images, weights)
    finally:
        for module, flag in training:
            module.training = flag
    seen = (gradient != 0).any(dim=0).any(dim=0)
    if not seen.any():  # an encoder that is constant at these weights: nothing can be said
        return 0
    strips = []
    for line in (seen.any(dim=0), seen.any(dim=1)):
        places = line.nonzero()
        strips += [int(places.min()), side - 1 - int(places.max())]
    return max(strips)


@torch.no_grad()
def without_zeros(encoder: nn.Module) -> nn.Module:
    """Fills parameters that are initialised with zeros, in place: they hide the branches behind them.

    Example:
        >>> layer = nn.init.zeros_(nn.Linear(2, 1).weight)
        >>> bool(without_zeros(nn.ParameterList([layer]))[0].any())
        True
    """
    for index, parameter in enumerate(encoder.parameters()):
        if not parameter.any():
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator) + 0.1)
    return encoder


def patch_size(encoder: nn.Module) -> int | None:
    """Side of the patches of timm's transformers and mixers, pixels; None for other encoders.

    Example:
        >>> patch_size(nn.Conv2d(3, 4, 16, stride=16)) is None
        True
    """
    for name in ("patch_embed", "stem"):
        size = getattr(getattr(encoder, name, None), "patch_size", None)
        size = size[0] if isinstance(size, tuple | list) and size else size
        if isinstance(size, int):
            return size
    return None


def unseen_beyond_tolerance(encoder: nn.Module, side: int, unseen: int) -> bool:
    """Whether a border of ``unseen`` pixels is to be refused.

    With patches it is any: they need not leave a rest. Without, it is one above :data:`MOST_UNSEEN`.

    Example:
        >>> convolution = nn.Conv2d(3, 4, 3)
        >>> unseen_beyond_tolerance(convolution, 32, 3), unseen_beyond_tolerance(convolution, 32, 4)
        (False, True)
    """
    patch = patch_size(encoder)
    with_rest = patch is not None and side % patch > 0
    return unseen > 0 if with_rest else unseen > MOST_UNSEEN * side


def refusal(encoder: nn.Module, side: int, unseen: int, setting: str, also: str = "") -> UserError:
    """What is said of an encoder that does not see the border of its images.

    Args:
        encoder: the encoder.
        side: of the images, pixels.
        unseen: see :func:`unseen_border`.
        setting: the config key, or flag, of the side.
        also: another remedy.

    Example:
        >>> str(refusal(nn.Conv2d(3, 4, 3), 32, 8, "crop_size")).partition(": ")[2]
        'the features do not depend on the outer 8 pixels; set crop_size=24'
    """
    patch, near = patch_size(encoder), [side - unseen]
    expected = "a size whose border the encoder sees"
    if patch is not None and side % patch > 0:
        expected = f"a multiple of the patch {patch}"
        near = [
            multiple for multiple in (side // patch * patch, (side // patch + 1) * patch) if multiple >= 16
        ]
    return UserError(
        f"{setting} must be {expected}, got {side}: the features do not depend on the outer {unseen} pixels; "
        f"set {setting}={' or '.join(map(str, near))}{also}"
    )


def check_reach(encoder: nn.Module, side: int, setting: str) -> None:
    """Refuses an encoder that does not see the border of its images.

    Args:
        encoder: as it is to be used.
        side: of the images, pixels.
        setting: the config key, or flag, of the side.

    Raises:
        UserError: see :func:`unseen_beyond_tolerance`; or the encoder cannot take such images.

    Example:
        >>> check_reach(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten()), 32, "crop_size")
    """
    try:
        unseen = unseen_border(encoder, side)
    except Exception as error:  # whatever a network says of a size
        reason = " ".join(f"{error}".split())[:160] or type(error).__name__
        raise UserError(f"{setting} must be a size that the encoder takes, got {side}: {reason}") from error
    if unseen_beyond_tolerance(encoder, side, unseen):
        raise refusal(encoder, side, unseen, setting)
