"""Self-supervised tasks: what fills L_task, one file each."""

from typing import Any

from metamask_plugin.errors import UserError, choose
from metamask_plugin.tasks.barlow_twins import BarlowTwins
from metamask_plugin.tasks.base import MomentumTask, Positives, Projections, Task, TaskOutput
from metamask_plugin.tasks.byol import BYOL
from metamask_plugin.tasks.cmc import CMC
from metamask_plugin.tasks.dcl import DCL
from metamask_plugin.tasks.hcl import HCL
from metamask_plugin.tasks.lmcl import LMCL
from metamask_plugin.tasks.moco import MoCo
from metamask_plugin.tasks.nnclr import NNCLR
from metamask_plugin.tasks.relic import RELIC
from metamask_plugin.tasks.ressl import ReSSL
from metamask_plugin.tasks.simclr import SimCLR
from metamask_plugin.tasks.simsiam import SimSiam
from metamask_plugin.tasks.ssl_hsic import SSLHSIC
from metamask_plugin.tasks.swav import SwAV
from metamask_plugin.tasks.wmse import WMSE

TASKS: dict[str, type[Task]] = {
    "simclr": SimCLR,
    "moco": MoCo,
    "cmc": CMC,
    "dcl": DCL,
    "hcl": HCL,
    "lmcl": LMCL,
    "nnclr": NNCLR,
    "relic": RELIC,
    "byol": BYOL,
    "simsiam": SimSiam,
    "ressl": ReSSL,
    "ssl_hsic": SSLHSIC,
    "barlow_twins": BarlowTwins,
    "wmse": WMSE,
    "swav": SwAV,
}


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


__all__ = [
    "BYOL",
    "BarlowTwins",
    "CMC",
    "DCL",
    "HCL",
    "LMCL",
    "MoCo",
    "MomentumTask",
    "NNCLR",
    "Positives",
    "Projections",
    "RELIC",
    "ReSSL",
    "SSLHSIC",
    "SimCLR",
    "SimSiam",
    "SwAV",
    "TASKS",
    "Task",
    "TaskOutput",
    "WMSE",
    "build_task",
]
