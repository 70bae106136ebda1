"""From what the user wrote to a complete pretraining config, in solo-learn's schema."""

import sys
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.cli.devices import device_count, on_cpu
from metamask_plugin.cli.paths import expand_paths
from metamask_plugin.cli.rehearsal import rehearse
from metamask_plugin.cli.schema import REQUIRED, pretraining_schema
from metamask_plugin.cli.schema_methods import BARE, METHOD_KWARGS, TASK_KWARGS
from metamask_plugin.cli.validate import blocks_of, plain, validate, without_empty_blocks
from metamask_plugin.data.augmentations import parse_augmentations
from metamask_plugin.data.registry import DATASETS
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.checkpoints import load_mask
from metamask_plugin.host.solo_settings import is_solo_task
from metamask_plugin.methods import METHODS
from metamask_plugin.tasks import TASKS

__all__ = ["complete", "device_count", "on_cpu", "validate_pretraining", "with_own_task_settings"]

IN_BLOCKS = [
    *(f"method_kwargs.{key}" for key in BARE),
    *(f"method_kwargs.task_kwargs.{key}" for key in TASK_KWARGS),
]
"""Keys that a slip may put at the top of a config."""

OPEN = ("hydra",)
"""Top-level keys that are not ours to check."""

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
    "auto_resume.extend": True,
    "wandb.enabled": False,
    "wandb.entity": None,
    "wandb.project": "metamask_plugin",
    "wandb.offline": False,
    "evaluation.enabled": True,
    "evaluation.final_report": True,
    "evaluation.knn.k": [5, 20, 200],
    "evaluation.knn.temperature": None,
    "evaluation.knn.every_n_epochs": 1,
    "evaluation.linear.protocol": "paper",
}
"""Used where the config is silent. The evaluation block is ours; solo-learn ignores it."""

IN_NAMES = {"imagenet100": "imagenet-100", "tiny_imagenet": "tiny-imagenet"}
"""How solo-learn spells data sets in the names of configs."""

OPTIMIZER_KWARGS = {"sgd": {"momentum": 0.9}, "lars": {"momentum": 0.9}}
"""solo-learn's defaults for what its optimisers leave at zero."""


def complete(cfg: DictConfig) -> DictConfig:
    """Checks every key, fills in defaults, counts the views, scales the learning rates. Works in place.

    The learning rates of a config are those of a batch of 256, as in solo-learn: they are multiplied
    by ``batch_size * devices * nodes / 256``.

    Args:
        cfg: the composed config.

    Raises:
        UserError: for an unknown or missing key, a value that cannot be, or values that cannot be together.
    """
    OmegaConf.set_struct(cfg, False)
    expand_paths(cfg)
    validate_pretraining(cfg)
    for key, value in DEFAULTS.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value, force_add=True)
    for key, value in OPTIMIZER_KWARGS.get(cfg.optimizer.name, {}).items():
        cfg.optimizer.kwargs.setdefault(key, value)
    cfg.name = _of_its_data(cfg.name, cfg.data.dataset)
    written_by_a_run = OmegaConf.select(cfg, "data.num_large_crops") is not None
    _count_views(cfg)
    _read_mask(cfg)
    rehearse(cfg)
    if written_by_a_run:
        return cfg  # an args.json, whose learning rates are scaled

    scale = cfg.optimizer.batch_size * device_count(cfg) * cfg.num_nodes / 256
    cfg.optimizer.lr *= scale
    cfg.optimizer.classifier_lr *= scale
    return cfg


def _read_mask(cfg: DictConfig) -> None:
    """Puts the weights of a learned mask in the place of its path: a run knows what it started from."""
    path = OmegaConf.select(cfg, "method_kwargs.mask.start")
    if isinstance(path, str):
        mask = load_mask(path)
        check(mask is not None, "method_kwargs.mask.start", "a run or checkpoint with a mask", path)
        cfg.method_kwargs.mask.start = mask.tolist()


def validate_pretraining(cfg: DictConfig) -> None:
    """Holds a composed config against the schema; takes out, in place, blocks that are null.

    Raises:
        UserError: for an unknown or missing key, with the nearest match, or a value that cannot be.
    """
    schema = pretraining_schema()
    without_empty_blocks(cfg, ["method_kwargs", *blocks_of(schema)])
    node = plain(cfg)
    validate({key: value for key, value in node.items() if key not in OPEN}, schema, elsewhere=IN_BLOCKS)
    if node.get("method") is not None:
        choose("method", node["method"], METHODS)
    for key in REQUIRED:
        check(OmegaConf.select(cfg, key) is not None, key, "set", None, "add it to the config")
    own = METHOD_KWARGS.get(cfg.method)
    if own is not None:
        validate(node.get("method_kwargs") or {}, own, "method_kwargs")
    parse_augmentations(cfg.augmentations)
    ignored = [key for key, setting in schema.items() if setting.unused and _differs(cfg, key)]
    if ignored:
        print(f"note: {', '.join(ignored)}: solo-learn's, without effect here", file=sys.stderr)


def _differs(cfg: DictConfig, key: str) -> bool:
    """Whether the user asks for something with a key; False and null ask for nothing."""
    return OmegaConf.select(cfg, key) not in (None, False)


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
