"""Self-supervised tasks: what fills L_task, one file each."""

from typing import Any

from metamask_plugin.errors import UserError, choose
from metamask_plugin.tasks.base import MomentumTask, Projections, Task
from metamask_plugin.tasks.simclr import SimCLR

TASKS: dict[str, type[Task]] = {"simclr": SimCLR}


def build_task(name: str, features_dim: int, kwargs: dict[str, Any]) -> Task:
    """Builds a task by name.

    Args:
        name: a key of :data:`TASKS`.
        features_dim: D, the encoder's output.
        kwargs: the task's own settings (``method_kwargs.task_kwargs``).

    Raises:
        UserError: for an unknown name or settings the task does not take.
    """
    task = TASKS[choose("method_kwargs.task", name, TASKS)]
    try:
        return task(features_dim, **kwargs)
    except TypeError as error:
        raise UserError(f"method_kwargs.task_kwargs do not fit the task {name!r}: {error}") from error


__all__ = ["TASKS", "MomentumTask", "Projections", "SimCLR", "Task", "build_task"]
