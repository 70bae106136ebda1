"""Whether a checkpoint can be resumed by a model, before anything starts."""

import pickle
from pathlib import Path

import torch
from torch import nn

from metamask_plugin.errors import UserError

NAME = "resume_from_checkpoint"


def check_resumable(path: Path, model: nn.Module) -> None:
    """Reads a training checkpoint and holds it against the model.

    Args:
        path: a checkpoint written by :class:`~metamask_plugin.training.checkpointer.Checkpointer`.
        model: the method that is to go on from it.

    Raises:
        UserError: if the file is missing, is no training checkpoint, or is of another architecture.
    """
    if not path.is_file():
        raise UserError(f"{NAME} must be a checkpoint file, got {str(path)!r}, which does not exist")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = state["state_dict"]
        state["optimizer_states"], state["loops"]
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{NAME} must be a training checkpoint, got {str(path)!r}, which cannot be read as one "
            f"({type(error).__name__}: {str(error).splitlines()[0]})"
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
