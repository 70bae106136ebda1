"""From what the user wrote to a complete pretraining config, in solo-learn's schema."""

from typing import Any

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.host.solo_settings import is_solo_task
from metamask_plugin.tasks import TASKS

DEFAULTS: dict[str, Any] = {
    "name": "run",
    "seed": 5,
    "max_epochs": 100,
    "resume_from_checkpoint": None,
    "num_nodes": 1,
    "devices": "1",
    "accelerator": "auto",
    "strategy": "auto",
    "precision": "32-true",
    "data.train_path": None,
    "data.val_path": None,
    "data.num_workers": 2,
    "data.fraction": -1,
    "data.no_labels": False,
    "data.download": False,
    "optimizer.classifier_lr": 0.1,
    "optimizer.weight_decay": 0.0,
    "optimizer.kwargs": {},
    "checkpoint.enabled": True,
    "checkpoint.dir": "trained_models",
    "checkpoint.frequency": 1,
    "auto_resume.enabled": False,
    "wandb.enabled": False,
    "wandb.entity": None,
    "wandb.project": "metamask_plugin",
    "wandb.offline": False,
    "evaluation.enabled": True,
    "evaluation.final_report": True,
    "evaluation.knn.k": [5, 20, 200],
    "evaluation.knn.temperature": 0.07,
    "evaluation.knn.every_n_epochs": 1,
    "evaluation.linear.protocol": "paper",
}
"""Used where the config is silent. The evaluation block is ours; solo-learn ignores it."""

OPTIMIZER_KWARGS = {"sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9}}
"""solo-learn's defaults for what its optimisers leave at zero."""


def complete(cfg: DictConfig) -> DictConfig:
    """Fills in defaults, counts the views, scales the learning rates. Works in place.

    The learning rates of a config are those of a batch of 256, as in solo-learn: they are multiplied
    by ``batch_size * devices * nodes / 256``.

    Args:
        cfg: the composed config.

    Raises:
        UserError: for a missing block or a value that cannot be.
    """
    OmegaConf.set_struct(cfg, False)
    for key in ("method", "backbone.name", "data.dataset", "optimizer.name", "optimizer.lr", "augmentations"):
        check(OmegaConf.select(cfg, key) is not None, key, "set", None, "add it to the config")
    for key, value in DEFAULTS.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value, force_add=True)
    for key, value in OPTIMIZER_KWARGS.get(cfg.optimizer.name, {}).items():
        cfg.optimizer.kwargs.setdefault(key, value)
    _check_numbers(cfg)
    _count_views(cfg)

    scale = cfg.optimizer.batch_size * device_count(cfg) * cfg.num_nodes / 256
    cfg.optimizer.lr *= scale
    cfg.optimizer.classifier_lr *= scale
    return cfg


def with_own_task_settings(cfg: DictConfig) -> DictConfig:
    """Makes ``method_kwargs.task=byol`` mean what ``task=byol`` means, where a config composes its task.

    The group brings the task's settings with it; the key alone would leave the previous task's there.
    """
    if not HydraConfig.initialized():  # composed by hand
        return cfg
    hydra_cfg = HydraConfig.get()
    task = OmegaConf.select(cfg, "method_kwargs.task")
    if hydra_cfg.runtime.choices.get("task", task) == task or is_solo_task(task):
        return cfg  # a method of solo-learn brings its settings itself
    choose("method_kwargs.task", task, TASKS)
    return hydra.compose(hydra_cfg.job.config_name, [*hydra_cfg.overrides.task, f"task={task}"])


def _check_numbers(cfg: DictConfig) -> None:
    positive_integers = ("max_epochs", "optimizer.batch_size", "checkpoint.frequency", "num_nodes")
    for key in (*positive_integers, "evaluation.knn.every_n_epochs"):
        value = OmegaConf.select(cfg, key)
        check(isinstance(value, int) and value >= 1, key, "an integer >= 1", value)
    for key in ("optimizer.lr", "optimizer.classifier_lr", "optimizer.weight_decay"):
        value = OmegaConf.select(cfg, key)
        check(isinstance(value, int | float) and value >= 0, key, "a number >= 0", value)
    k = cfg.evaluation.knn.k
    check(OmegaConf.is_list(k) and len(k) > 0 and min(k) >= 1, "evaluation.knn.k", "a list like [5, 20]", k)


def _count_views(cfg: DictConfig) -> None:
    """solo-learn's rule: a pipeline with the first one's ``crop_size`` makes large crops, else small."""
    large = small = 0
    for index, pipeline in enumerate(cfg.augmentations):
        for key in ("crop_size", "num_crops"):
            value = pipeline.get(key)
            check(
                isinstance(value, int) and value >= 1,
                f"augmentations[{index}].{key}",
                "an integer >= 1",
                value,
            )
        if pipeline.crop_size == cfg.augmentations[0].crop_size:
            large += pipeline.num_crops
        else:
            small += pipeline.num_crops
    check(large >= 2, "augmentations", "pipelines that make at least 2 large crops together", large)
    cfg.data.num_large_crops, cfg.data.num_small_crops = large, small


def device_count(cfg: DictConfig) -> int:
    """How many devices ``devices`` asks for: a list, ``"2"``, ``"0,1"``, 2, -1 or ``auto``."""
    devices = cfg.devices
    if OmegaConf.is_list(devices):
        return 1 if on_cpu(cfg) else len(devices)
    text = str(devices)
    if text in ("auto", "-1"):
        return 1 if on_cpu(cfg) else max(1, torch.cuda.device_count())
    try:
        return int(text) if "," not in text else len([part for part in text.split(",") if part.strip()])
    except ValueError:
        raise UserError(f"devices must be a number, a list or 'auto', got {devices!r}") from None


def on_cpu(cfg: DictConfig) -> bool:
    """Whether this run will use the CPU, asked for or for want of anything else."""
    return cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not torch.cuda.is_available())
