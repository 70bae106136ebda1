"""Whether a checkpoint can be resumed by a model, before anything starts."""

from collections.abc import Mapping
from pathlib import Path

import torch
from omegaconf import OmegaConf
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import (
    encoder_of,
    encoder_weights,
    read_args,
    read_checkpoint,
    recorded_host,
)

NAME = "resume_from_checkpoint"


def check_resumable(path: Path, model: nn.Module) -> None:
    """Reads a training checkpoint and holds it against the model.

    Args:
        path: a checkpoint written by :class:`~metamask_plugin.training.checkpointer.Checkpointer`.
        model: the method that is to go on from it.

    Raises:
        UserError: if the file is missing, is no training checkpoint, is of another architecture, or of the
            other host where that makes a difference.
    """
    if not path.is_file():
        raise UserError(f"{NAME} must be a checkpoint file, got {str(path)!r}, which does not exist")
    state = read_checkpoint(path)
    try:
        weights = state["state_dict"]
        state["optimizer_states"], state["loops"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{NAME} must be a training checkpoint, got {str(path)!r}, which cannot be read as one "
            f"({type(error).__name__}: {error})"
        ) from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{NAME} must match the configured model, got {str(path)!r} of another architecture: "
                f"{name} is {expected.get(name, 'absent')} in the model and "
                f"{found.get(name, 'absent')} in the checkpoint; set backbone.name and method_kwargs "
                "as in the args.json beside it"
            )
    _check_host(path, model, weights)


def _check_host(path: Path, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Equal shapes are not enough: the hosts' ResNets differ in padding, their LARS in its state."""
    cfg, args = getattr(model, "cfg", None), read_args(path)
    recorded, used = recorded_host(args), OmegaConf.select(cfg, "host") if cfg is not None else None
    if None in (recorded, used) or recorded == used:
        return
    name = cfg.backbone.name
    remedy = f"resume it with METAMASK_HOST={recorded}, or train anew"
    if cfg.optimizer.name == "lars":
        raise UserError(
            f"{NAME} must be of the host in use, {used!r}, for optimizer.name='lars', got {str(path)!r} "
            f"trained under {recorded!r}; {remedy}"
        )
    size = OmegaConf.select(cfg, "augmentations[0].crop_size", default=32)
    kwargs = args["backbone"].get("kwargs") or {}
    with torch.device("meta"):  # to be described, not run
        theirs = encoder_of(name, size, kwargs, recorded, args.get("method"), encoder_weights(weights))
    if str(theirs) != str(model.backbone):
        raise UserError(
            f"{NAME} must be of the host in use, {used!r}, whose {name} is another network of the same "
            f"shapes, got {str(path)!r} trained under {recorded!r}; {remedy}"
        )
