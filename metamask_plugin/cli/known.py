"""Names that there are, by kind of config (``pretrain``, ``linear``, ``study``): of configs, and of keys."""

from pathlib import Path

from metamask_plugin import SCRIPTS

GROUPS = {"pretrain": ("metamask_*.yaml", "icl_msr_*.yaml"), "linear": ("*.yaml",), "study": ()}
"""Files in folders that are configs of their own, not parts of one, by kind of config."""


def shipped(kind: str) -> list[str]:
    """Names of the configs that ``--config-name`` takes.

    Args:
        kind: ``pretrain``, ``linear`` or ``study``.
    """
    root = SCRIPTS / kind
    found = [*root.glob("*.yaml"), *(path for glob in GROUPS[kind] for path in root.glob(f"*/{glob}"))]
    names = {path.relative_to(root).with_suffix("").as_posix() for path in found}
    return sorted(name for name in names if name != "base" and not name.startswith("setting/"))


def as_a_path(name: str) -> str:
    """What is said of a config that is named by its file."""
    file = Path(name)
    remedy = f"write --config-dir {file.parent} --config-name {file.stem}"
    return f"--config-name must be a name, got {name!r}; {remedy}"


def names_of(group: str) -> list[str]:
    """Names of a group's parts, for a pretraining config."""
    return sorted(path.stem for path in (SCRIPTS / "pretrain" / group).glob("*.yaml"))


PARTS = ("task", "ablation", "setting", "augmentations")
"""Keys of a pretraining config that choose a part of it, a file of a folder."""

FREE = {
    "pretrain": (
        *("backbone.kwargs", "data.kwargs", "optimizer.kwargs", "method_kwargs.regularizer.kwargs"),
        *("method_kwargs.meta.optimizer.kwargs", "method_kwargs.meta.estimator_kwargs"),
    ),
    "linear": ("backbone.kwargs", "data.kwargs", "data.augmentations", "optimizer.kwargs"),
    "study": ("measures", "roots", "data", "baseline", "equal_time"),
}
"""Blocks whose keys belong to what they are handed to."""


def keys(kind: str) -> list[str]:
    """Dotted names of all keys of a kind of config, but for those that are only handed on to Lightning."""
    from metamask_plugin.config import linear, pretraining
    from metamask_plugin.config.methods import Baseline, TaskKwargs
    from metamask_plugin.config.read import keys_of
    from metamask_plugin.config.solo_learn import WITHOUT_EFFECT
    from metamask_plugin.config.studies import MEASURES, Study

    if kind == "study":
        return [
            *keys_of(Study),
            *(key for name, m in MEASURES.items() for key in keys_of(m, f"measures.{name}.")),
        ]
    if kind == "linear":
        return [*keys_of(linear.Linear), *linear.WITHOUT_EFFECT]
    own = keys_of(Baseline, "method_kwargs.")
    task = keys_of(TaskKwargs, "method_kwargs.task_kwargs.")
    return [*PARTS, *keys_of(pretraining.Pretraining), *WITHOUT_EFFECT, *own, *task]


KEYS = {
    "arch": "backbone.name",
    "betas": "optimizer.kwargs.betas",
    "batch_size": "optimizer.batch_size",
    "config": "--config-name",
    "dataset": "data.dataset",
    "encoder": "backbone.name",
    "epochs": "max_epochs",
    "gpus": "devices",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "model": "backbone.name",
    "momentum": "optimizer.kwargs.momentum",
    "num_workers": "data.num_workers",
    "output_dir": "checkpoint.dir",
    "pretrained": "pretrained_feature_extractor",
    "pretrained_checkpoint_dir": "pretrained_feature_extractor",
    "resume": "resume_from_checkpoint",
    "save_dir": "checkpoint.dir",
    "temperature": "method_kwargs.task_kwargs.temperature",
    "train_path": "data.train_path",
    "val_path": "data.val_path",
    "wd": "optimizer.weight_decay",
    "weight_decay": "optimizer.weight_decay",
    "workers": "data.num_workers",
}
"""Of the configs; one that a kind of config does not have is passed over."""

BLOCKS = {"backbone": "backbone.name", "data": "data.dataset", "optimizer": "optimizer.name"}
"""Blocks of keys that are given a word, and the key that takes it."""

PRECISIONS = {
    "amp": "16-mixed",
    "bf16": "bf16-mixed",
    "fp16": "16-mixed",
    "fp32": "32-true",
    "half": "16-mixed",
    "mixed": "16-mixed",
}

CHOICES = {
    "ablation": {"no_mask": "no_meta", "baseline": "no_meta"},
    "scheduler.name": {"cosine": "warmup_cosine"},
}
"""Words for a choice, by its group or key."""
