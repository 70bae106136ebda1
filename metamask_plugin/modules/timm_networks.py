"""timm's networks: no file that a config names is loaded, and no hub waited for that does not answer."""

import os
from contextlib import suppress
from typing import Any

import timm
import torch
from torch import nn

from metamask_plugin.errors import UserError, check

FROM_ELSEWHERE = ("cache_dir", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
"""Arguments of ``timm.create_model`` that name files or addresses.

timm before 1.0.28 reads such a file with a loader that runs code, and a config may have come with somebody
else's checkpoint.
"""

SECONDS = 5
"""How long the hub may take to answer at all. Its own client tries for three quarters of a minute."""


def timm_network(name: str, image_size: int | None, setting: str = "backbone", **kwargs: Any) -> nn.Module:
    """Builds a model of timm's without classifier, by default with random weights.

    Its ``num_features`` is the width of what it returns. timm's own is that of the feature map, and its heads
    of some families have a hidden layer, which stays.

    Args:
        name: one of ``timm.list_models()``.
        image_size: side of the square input, pixels; None for the model's own.
        setting: for messages, the config block that names the model, or ``timm:<name>`` where a line does.
        kwargs: of ``timm.create_model``; ``pretrained=True`` fetches weights.

    Raises:
        UserError: the arguments name weights from elsewhere, or ``pretrained`` weights cannot be fetched.
        TypeError: for arguments that the model does not have.

    Example:
        >>> network = timm_network("mobilenetv3_small_050", image_size=32)
        >>> network.num_features  # with the hidden layer of its head
        1024
    """
    refused = [key for key in FROM_ELSEWHERE if key in kwargs]
    remedy = "such files are not loaded, as they can run code; leave these keys out"
    check(not refused, f"{setting}.kwargs", f"without {', '.join(FROM_ELSEWHERE)}", refused, remedy)
    kwargs = {"pretrained": False, "num_classes": 0, **kwargs}
    classes = kwargs["num_classes"]
    check(classes == 0, f"{setting}.kwargs.num_classes", "0, as features are wanted, or left out", classes)
    if kwargs["pretrained"]:
        _check_fetchable(name, setting)
    try:
        network = _create(name, image_size, kwargs)
    except (TypeError, UserError):
        raise
    except Exception as error:  # while fetching it fails in as many ways as there are libraries between
        if not kwargs["pretrained"]:
            raise
        raise _not_fetched(name, setting, error) from error
    side = image_size or network.pretrained_cfg["input_size"][-1]
    network.num_features = _output_width(network, name, side, kwargs) or network.num_features
    return network


def _output_width(network: nn.Module, name: str, side: int, kwargs: dict[str, Any]) -> int | None:
    """The width of one image's features; None where they are no vector, or the network cannot take the image.

    It is measured on a copy on the meta device, whose tensors have shapes and no numbers: that takes
    milliseconds, whatever the network. Where there can be no such copy, the network itself takes the image.
    """

    with torch.random.fork_rng(devices=[]):
        with suppress(Exception), torch.device("meta"):
            without_numbers = next(network.parameters()).is_meta
            copy = network if without_numbers else _create(name, side, {**kwargs, "pretrained": False})
            return _width(copy, side)
        with suppress(Exception):  # why it cannot take the image is said where it is given one
            return _width(network, side)
    return None


@torch.no_grad()
def _width(network: nn.Module, side: int) -> int | None:
    training = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        feats = network(torch.zeros(1, 3, side, side, device=next(network.parameters()).device))
    finally:
        for module, flag in training:
            module.training = flag
    return feats.shape[1] if isinstance(feats, torch.Tensor) and feats.dim() == 2 else None


def _create(name: str, image_size: int | None, kwargs: dict[str, Any]) -> nn.Module:
    if image_size is not None:
        try:  # transformers fix their input size at construction, convolutional networks refuse the key
            return timm.create_model(name, img_size=image_size, **kwargs)
        except TypeError:
            pass
    return timm.create_model(name, **kwargs)


def _check_fetchable(name: str, setting: str) -> None:
    """Ends in seconds where there is neither a network nor an earlier download."""
    hub_id = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    if hub_id is None:
        return
    # comes with timm; imported here as it takes a while, and most runs fetch nothing
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.utils import get_session

    repository, _, revision = hub_id.partition("@")
    files = ("model.safetensors", "pytorch_model.bin")
    if any(
        isinstance(try_to_load_from_cache(repository, file, revision=revision or None), str) for file in files
    ):
        return
    try:
        get_session().head(os.environ.get("HF_ENDPOINT", constants.ENDPOINT), timeout=SECONDS)
    except Exception as error:
        raise _not_fetched(name, setting, error) from error


def _not_fetched(name: str, setting: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split()) or "no reason given"
    reason = reason if len(reason) <= 160 else f"{reason[:155]} ..."
    shown, remedy = f"{setting}.name={name!r}", "or take pretrained=False"
    if setting.startswith("timm:"):
        shown, remedy = setting, f"give them as a file: timm:{name.split('.')[0]}=<file>"
    return UserError(
        f"{shown} must have weights that can be fetched from here, got {type(error).__name__} ({reason}); "
        f"{remedy}"
    )
