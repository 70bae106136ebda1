"""Whether a checkpoint can be resumed, and which, before anything starts."""

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from metamask_plugin.training.run_folder import RunFolder

NAME = "resume_from_checkpoint"

SHOWN = 6
"""Differences between two configs that a message names; of the others it says how many there are."""

OF_THE_EPOCH = (
    "seed",
    "data",
    "augmentations",
    "optimizer.batch_size",
    "accumulate_grad_batches",
    "limit_train_batches",
    "devices",
    "num_nodes",
)
"""What decides which batches an epoch has, in which order."""


def resumable(folder: RunFolder, model: nn.Module, identity: Mapping[str, Any]) -> Path | None:
    """The checkpoint from which a run goes on by itself: the last, or the one before where that is unusable.

    An unusable one is moved aside (``last.ckpt.unusable``), so that it takes no other's place.

    Args:
        folder: the run's folder.
        model: the method that is to go on.
        identity: of this run, see :class:`~metamask_plugin.training.checkpointer.Checkpointer`.

    Returns:
        None where the run has no checkpoint yet.

    Raises:
        UserError: there are checkpoints, and none is usable.
    """
    reasons = []
    for path in (folder.last_checkpoint, folder.previous_checkpoint):
        if not path.exists():
            continue
        try:
            found = differences(check_resumable(path, model).get("identity"), identity)
            if found:
                raise UserError(
                    f"checkpoint {path} must be of this run, got another experiment's: {_shown(found)}"
                )
        except UserError as error:
            reasons.append(str(error))
            continue
        for reason in reasons:
            print(
                f"warning: {reason}\n"
                f"warning: resuming {path}, the one before; the other is now {_aside(folder)}"
            )
        return path
    if reasons:
        raise UserError(
            f"{reasons[0]}; {folder.path} holds no other that can be resumed: move it away, or train "
            "anew with auto_resume.enabled=False"
        )
    return None


def _aside(folder: RunFolder) -> str:
    aside = folder.last_checkpoint.with_name(folder.last_checkpoint.name + ".unusable")
    with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
        os.replace(folder.last_checkpoint, aside)
    return aside.name


def asked_for(path: Path, model: nn.Module, identity: Mapping[str, Any]) -> Path:
    """The checkpoint that the user names, with a warning where it is of a run with other settings.

    Raises:
        UserError: it does not fit the model, is of another method, or was saved within an epoch that would
            not have the same batches here.
    """
    state = check_resumable(path, model)
    found = differences(state.get("identity"), identity)
    if not found:
        return path
    if "method" in found:
        raise UserError(f"{NAME} must be of the same method, got {str(path)!r}: {_shown(found)}")
    batches = [
        key for key in found if any(key == name or key.startswith(f"{name}.") for name in OF_THE_EPOCH)
    ]
    if batches and state.get("batches_done"):
        raise UserError(
            f"{NAME} must be of a run with the same batches where it was saved within an epoch, got "
            f"{str(path)!r}: {_shown({key: found[key] for key in batches})}; take these settings, or a "
            "checkpoint of a whole epoch"
        )
    print(f"warning: {path} was trained with other settings: {_shown(found)}")
    return path


def differences(recorded: Mapping[str, Any] | None, wanted: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two runs differ, by their dotted keys: there, and here.

    A run that recorded nothing, as those of earlier versions, differs in nothing.
    """
    if not recorded:
        return {}
    there, here = dict(_flat(recorded)), dict(_flat(wanted))
    keys = sorted(there.keys() | here.keys())
    return {key: (there.get(key), here.get(key)) for key in keys if there.get(key) != here.get(key)}


def _flat(tree: Any, path: Sequence[str] = ()) -> list[tuple[str, Any]]:
    """Leaves, of lists too, and their dotted keys."""
    if isinstance(tree, Mapping):
        return [leaf for key, value in tree.items() for leaf in _flat(value, (*path, str(key)))]
    if isinstance(tree, list | tuple):
        return [leaf for key, value in enumerate(tree) for leaf in _flat(value, (*path, str(key)))]
    return [(".".join(path), tree)]


def _shown(found: Mapping[str, tuple[Any, Any]]) -> str:
    texts = [f"{key} {there!r} there, {here!r} here" for key, (there, here) in found.items()]
    more = f", and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return "; ".join(texts[:SHOWN]) + more


def check_resumable(path: Path, model: nn.Module) -> dict[str, Any]:
    """Reads a training checkpoint and holds it against the model.

    Args:
        path: a checkpoint written by :class:`~metamask_plugin.training.checkpointer.Checkpointer`.
        model: the method that is to go on from it.

    Returns:
        What it holds.

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
    return state


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
