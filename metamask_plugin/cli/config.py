"""From what the user wrote to a complete, frozen pretraining config; and to what a method is built from."""

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from metamask_plugin import host
from metamask_plugin.cli.checked import checked_pretraining, frozen
from metamask_plugin.cli.dry_run import dry_run
from metamask_plugin.cli.machine import device_count, on_cpu, processes
from metamask_plugin.config.views import count_views
from metamask_plugin.data.registry import DATASETS
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.checkpoints import load_mask
from metamask_plugin.host.solo_settings import is_solo_task
from metamask_plugin.methods import METHODS
from metamask_plugin.methods.presets import without_nulls
from metamask_plugin.renamed import VALUES
from metamask_plugin.tasks import TASKS

__all__ = ["complete", "device_count", "for_method", "on_cpu", "recorded", "with_own_task_settings"]

IN_NAMES = {"imagenet100": "imagenet-100", "tiny_imagenet": "tiny-imagenet"}
"""How solo-learn spells data sets in the names of configs."""

OPTIMIZER_KWARGS = {"sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9}}
"""solo-learn's defaults for what its optimisers leave at zero."""

SCALED = ("optimizer.lr", "optimizer.classifier_lr")
"""Learning rates that a config gives for a batch of 256."""

COUNTED = ("data.num_large_crops", "data.num_small_crops")
"""Written by solo-learn, and by earlier versions, beside learning rates that are scaled already."""


def complete(cfg: DictConfig) -> DictConfig:
    """Checks every key, fills in defaults, and builds once, without memory, all that the config names.

    Args:
        cfg: the composed config; it stays as it is.

    Returns:
        The config, frozen: it can be composed again from what is written of it.

    Raises:
        UserError: for an unknown or missing key, a value that cannot be, or values that cannot be together.
    """
    node = checked_pretraining(cfg)
    choose("method", node["method"], set(METHODS) - set(VALUES["method"]))
    trained = node["host"] or host.name  # of a run's args.json
    check(
        trained == host.name, "host", f"{host.name}, which is in use", trained, f"set METAMASK_HOST={trained}"
    )
    optimizer, mask = node["optimizer"], (node["method_kwargs"].get("mask") or {})
    optimizer["kwargs"] = {**OPTIMIZER_KWARGS.get(optimizer["name"], {}), **optimizer["kwargs"]}
    node["name"] = _of_its_data(node["name"], node["data"]["dataset"])
    if isinstance(mask.get("start"), str):  # a run knows what it started from
        weights = load_mask(mask["start"])
        check(
            weights is not None,
            "method_kwargs.mask.start",
            "a run or checkpoint with a mask",
            mask["start"],
        )
        mask["start"] = weights.tolist()
    found = frozen(node)
    dry_run(found, for_method(found))
    return found


def for_method(cfg: DictConfig, num_classes: int | None = None) -> DictConfig:
    """What a method is built from, as solo-learn's are: rates of this very batch, views and classes counted.

    The learning rates of a config are those of a batch of 256, as in solo-learn: here they are multiplied by
    ``batch_size * devices * nodes / 256``.

    Args:
        cfg: a complete config; it stays as it is.
        num_classes: of the data; None before they are read.
    """
    own = OmegaConf.create(without_nulls(OmegaConf.to_container(cfg)))
    if any(OmegaConf.select(own, key) is None for key in COUNTED):
        scale = own.optimizer.batch_size * processes(own) / 256
        for key in SCALED:
            OmegaConf.update(own, key, OmegaConf.select(own, key) * scale)
    views = count_views([(entry.crop_size, entry.get("num_crops", 1)) for entry in own.augmentations])
    own.data.num_large_crops, own.data.num_small_crops = views
    own.data.num_classes = num_classes or own.data.get("num_classes") or 1000
    return own


def recorded(cfg: DictConfig, own: DictConfig) -> DictConfig:
    """What is written of a run, as ``args.json``: a config that trains the same again.

    Args:
        cfg: the complete config.
        own: what the method was built from, with the defaults that it filled in.
    """
    found = own.copy()
    if all(OmegaConf.select(cfg, key) is None for key in COUNTED):
        for key in SCALED:
            OmegaConf.update(found, key, OmegaConf.select(cfg, key))
        for key in COUNTED:
            found.data.pop(key.removeprefix("data."))
    return found


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


def _of_its_data(name: str, dataset: str) -> str:
    """A config's name ends in its data set, and follows where another one is asked for."""
    spelt = [(f"-{word}", other) for other in DATASETS for word in (other, IN_NAMES.get(other, other))]
    for ending, other in sorted(spelt, key=lambda pair: -len(pair[0])):
        if name.endswith(ending):
            return name if other == dataset else f"{name.removesuffix(ending)}-{dataset}"
    return name
