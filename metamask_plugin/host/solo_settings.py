"""Which of solo-learn's methods can be tasks, and their settings: ``method_kwargs.task: solo:<name>``."""

from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

PREFIX = "solo:"

SETTINGS: dict[str, dict[str, Any]] = {
    "all4one": {"temperature": 0.2, "pred_hidden_dim": 4096, "queue_size": 98304},
    "barlow_twins": {"proj_output_dim": 2048, "scale_loss": 0.1},
    "byol": {"proj_hidden_dim": 4096, "pred_hidden_dim": 4096},
    "deepclusterv2": {"proj_output_dim": 128, "num_prototypes": [3000, 3000, 3000]},
    "dino": {"num_prototypes": 4096, "momentum": {"base_tau": 0.9995}},
    "mocov2plus": {"temperature": 0.2, "queue_size": 32768, "momentum": {"final_tau": 0.999}},
    "mocov3": {"proj_hidden_dim": 4096, "pred_hidden_dim": 4096, "temperature": 0.2},
    "nnbyol": {"proj_hidden_dim": 4096, "pred_hidden_dim": 4096, "queue_size": 65536},
    "nnclr": {"pred_hidden_dim": 4096, "temperature": 0.2, "queue_size": 65536},
    "nnsiam": {"proj_output_dim": 2048, "pred_hidden_dim": 4096, "queue_size": 65536},
    "ressl": {"proj_hidden_dim": 4096, "temperature_q": 0.1, "temperature_k": 0.04},
    "simclr": {"temperature": 0.2},
    "simsiam": {"proj_output_dim": 2048, "pred_hidden_dim": 512, "temperature": 0.2},
    "supcon": {"temperature": 0.2},
    "swav": {
        "proj_output_dim": 128,
        "num_prototypes": 3000,
        "temperature": 0.1,
        "queue_size": 3840,
        "epoch_queue_starts": 50,
        "freeze_prototypes_epochs": 2,
    },
    "vibcreg": {
        "proj_output_dim": 2048,
        "sim_loss_weight": 25.0,
        "var_loss_weight": 25.0,
        "cov_loss_weight": 200.0,
        "iternorm": False,  # True there: but its backward pass is written by hand, and has no derivative
    },
    "vicreg": {
        "proj_output_dim": 2048,
        "sim_loss_weight": 25.0,
        "var_loss_weight": 25.0,
        "cov_loss_weight": 1.0,
    },
    "wmse": {"proj_hidden_dim": 1024, "proj_output_dim": 64, "whitening_size": 128},
}
"""solo-learn's settings for CIFAR (scripts/pretrain/cifar), for what the user does not give."""

COMMON = {
    "proj_hidden_dim": 2048,
    "proj_output_dim": 256,
    "momentum": {"base_tau": 0.99, "final_tau": 1.0, "classifier": False},
}

NOT_TASKS = {
    "base": "it has no loss",
    "linear": "it is a probe, not a pretext task",
    "mae": "it reconstructs pixels from its own ViT's patches and has no features to weigh",
}

WITH_MSR = ("barlow_twins", "vicreg", "vibcreg")
"""Losses that compare two views directly: no negatives, which must stay as they are, and no stop-gradient
on the positive, through which A would learn nothing."""


def is_solo_task(name: Any) -> bool:
    """Whether a config's ``method_kwargs.task`` names a method of solo-learn."""
    return isinstance(name, str) and name.startswith(PREFIX)


def own_settings(cfg: DictConfig) -> DictConfig:
    """``task_kwargs`` for ``solo:<name>``: solo-learn's settings under what the user gives.

    Where the command line alone names the task (``method_kwargs.task=solo:byol``), the config's own
    ``task_kwargs`` are those of another one; then only the command line's count.

    Args:
        cfg: the whole config.
    """
    kwargs = cfg.method_kwargs
    given = kwargs.get("task_kwargs") or {}
    if HydraConfig.initialized():
        overrides = [text.lstrip("+") for text in HydraConfig.get().overrides.task]
        if any(text.startswith("method_kwargs.task=") for text in overrides):
            path = "method_kwargs.task_kwargs."
            own = [text.removeprefix(path) for text in overrides if text.startswith(path)]
            given = OmegaConf.from_dotlist(own)
    return OmegaConf.merge(COMMON, SETTINGS.get(kwargs.task.removeprefix(PREFIX), {}), given)
