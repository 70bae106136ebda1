"""Every key of a pretraining config: what it means, and which values it takes. One entry a key.

``method_kwargs`` is in :mod:`~metamask_plugin.cli.schema_methods`, the checks of single values in
:mod:`~metamask_plugin.cli.settings`, what several keys cannot be together in
:mod:`~metamask_plugin.cli.contradictions`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from metamask_plugin.cli.settings import (
    MOST_WHOLE,
    Setting,
    block,
    flag,
    number,
    path,
    registry,
    sequence,
    text,
    whole,
    word,
)

LARGEST_SEED = 2**32 - 1
ACCELERATORS = registry("cli.devices:ACCELERATORS")
DATASETS = registry("data.registry:DATASETS")
REGIONS = registry("data.regions:REGIONS")
FORMS = registry("data.regions:FORMS")
COMPILE = registry("modules.compiled:NAMED_MODES")
FOLDER_NAME = Setting("name of the run's folder, without its digest", "folder name", null=True)
SEED = whole("of weights, order of the images, views; 5 by default", 0, LARGEST_SEED, null=True)

RUN: dict[str, Setting] = {
    "name": FOLDER_NAME,
    "method": word("what is trained: metamask, icl_msr, bare, supervised", registry("methods:METHODS")),
    "seed": SEED,
    "max_epochs": whole("passes over the training images", 1, null=True),
    "max_steps": whole("optimiser steps after which training ends", 1, also=(-1,), null=True),
    "resume_from_checkpoint": path("a last.ckpt to go on from", null=True),
    "accelerator": word(
        "auto: CUDA if there is a device, else the CPU; mps is untested", ACCELERATORS, null=True
    ),
    "devices": Setting('a number ("1"), a list ([0, 1]) or auto'),
    "num_nodes": whole("machines", 1, 10_000, null=True),
    "strategy": text("Lightning's: auto, ddp ...", null=True),
    "precision": Setting("Lightning's: 32-true, 16-mixed, bf16-mixed ... The meta step does not follow it"),
    "accumulate_grad_batches": whole("batches before an optimiser step", 1, null=True),
    "gradient_clip_val": number("largest norm, or value, of the gradient", 0, null=True),
    "gradient_clip_algorithm": word("what gradient_clip_val limits", ("norm", "value"), null=True),
    "limit_train_batches": Setting("batches of an epoch (an integer), or a share of them (a float)"),
    "process_timeout": number("seconds that processes wait for one another", above=0, null=True),
    "sync_batchnorm": flag("BatchNorm over all processes; without a meta step alone", null=True),
    "benchmark": flag("cuDNN's search for the fastest convolution", null=True),
    "deterministic": flag(
        "deterministic algorithms alone; warn where there is none", also=("warn",), null=True
    ),
    "augmentations": Setting("solo-learn's list: how the views are made"),
    "host": word("written by a run: which host trained it", ("solo", "embedded"), null=True),
    "debug_augmentations": flag("solo-learn's: shows the views", null=True, unused=True),
}

BLOCKS: dict[str, Setting] = {
    "backbone.name": text("conv4, conv, fc, resnet18, resnet50, or any model of timm's"),
    "backbone.kwargs": block("of the encoder's constructor", null=True),
    "data.dataset": word("see metamask-ssl list datasets", DATASETS),
    "data.train_path": path("folder of the training images", null=True),
    "data.val_path": path("folder of the test images", null=True),
    "data.format": word(
        "image_folder, or dali: NVIDIA DALI reads the files", registry("data.datamodule:FORMATS"), null=True
    ),
    "data.pipeline": word("where the views are made", registry("data.datamodule:PIPELINES"), null=True),
    "data.on_device": flag("images on the GPU; null: where they fit", null=True),
    "data.num_workers": whole("processes that read images", 0, 1024, null=True),
    "data.fraction": number(
        "share of the training images, -1 for all",
        above=0,
        below=1,
        also=(-1, -1.0),
        null=True,
        expected="between 0 and 1 (or -1 for all images)",
    ),
    "data.no_labels": flag("train without labels", null=True),
    "data.download": flag("torchvision's data sets are fetched", null=True),
    "data.region": word("what of the images is seen; needs boxes", REGIONS, null=True),
    "data.region_form": word("a foreground in its place, or enlarged", FORMS, null=True),
    "data.verify": word("what is looked at in every file", ("none", "header", "decode"), null=True),
    "data.invalid_images": word("what a file that cannot be read does", ("stop", "skip"), null=True),
    "data.mean": sequence(
        "per channel, subtracted from images in [0, 1]; null: the data set's",
        number("of a channel"),
        null=True,
    ),
    "data.std": sequence("what they are then divided by", number("of a channel", above=0), null=True),
    "data.bits": whole("bits that 16-bit grey uses, e.g. 12; null: 16", 8, 16, null=True),
    "data.evaluation_resize": whole(
        "pixels of the shorter side before the evaluation's centre crop; null: solo-learn's",
        1,
        8192,
        null=True,
    ),
    "data.kwargs": block("options of the generated data sets; COCO's annotations", null=True),
    "data.num_classes": whole("written by a run", 1, null=True),
    "data.num_large_crops": whole("written by a run", 0, null=True),
    "data.num_small_crops": whole("written by a run", 0, null=True),
    "dali.device": word("where DALI works", ("cpu", "gpu"), null=True),
    "dali.encode_indexes_into_labels": flag("solo-learn's", null=True, unused=True),
    "optimizer.name": word("of encoder and heads", registry("host.contract:OPTIMIZERS")),
    "optimizer.batch_size": whole("images a step and process; BatchNorm needs two", 2, 10**7),
    "optimizer.lr": number("learning rate of a batch of 256", 0, 1e6),
    "optimizer.classifier_lr": number("of the online classifier, likewise", 0, 1e6, null=True),
    "optimizer.weight_decay": number("of all parameters of encoder and heads", 0, 1e6, null=True),
    "optimizer.exclude_bias_n_norm_wd": flag("no weight decay on biases and norms", null=True),
    "optimizer.kwargs": block("of the optimiser's constructor", null=True),
    "optimizer.layer_decay": number("solo-learn's, of MAE", 0, null=True, unused=True),
    "scheduler.name": word(
        "how the learning rate changes", registry("host.contract:SCHEDULERS", "warmup_step")
    ),
    "scheduler.warmup_epochs": number("of warmup_cosine; 10 by default", 0, null=True),
    "scheduler.warmup_start_lr": number("learning rate at step 0", 0, 1e6, null=True),
    "scheduler.min_lr": number("learning rate at the end of the cosine", 0, 1e6, null=True),
    "scheduler.interval": word("when warmup_cosine is stepped", ("step", "epoch"), null=True),
    "scheduler.lr_decay_steps": sequence(
        "epochs of step and warmup_step; of the latter negative ones count from the end",
        whole("an epoch", -MOST_WHOLE),
        null=True,
    ),
    "scheduler.warmup_steps": whole("of warmup_step, optimiser steps", 0, null=True),
    "scheduler.decay_factor": number("of warmup_step", above=0, most=1, null=True),
    "checkpoint.enabled": flag("whether last.ckpt and best.ckpt are written", null=True),
    "checkpoint.dir": path("folder of all runs", null=True),
    "checkpoint.frequency": whole("epochs between checkpoints", 1, null=True),
    "checkpoint.every_n_steps": whole("steps between checkpoints within an epoch", 1, null=True),
    "checkpoint.keep_prev": flag("solo-learn's", null=True, unused=True),
    "auto_resume.enabled": flag("the same command goes on with its run", null=True),
    "auto_resume.extend": flag("goes on from a run that was to be shorter", null=True),
    "auto_resume.max_hours": number("solo-learn's", 0, null=True, unused=True),
    "numbers.nonfinite": word("what a loss or gradient that is not finite does", ("stop", "skip"), null=True),
    "numbers.max_skipped": whole("steps of a run that may be skipped", 0, null=True),
    "numbers.collapse_below": number("spread of the features below which a warning is due", 0, null=True),
    "evaluation.enabled": flag("kNN while training, and the report", null=True),
    "evaluation.final_report": flag("tables and pictures at the end", null=True),
    "evaluation.knn.k": sequence(
        "numbers of neighbours", whole("neighbours", 1), null=True, expected="a list like [5, 20]"
    ),
    "evaluation.knn.temperature": number("of the votes; null: 1 for k = 5, else 0.07", above=0, null=True),
    "evaluation.knn.every_n_epochs": whole("epochs between evaluations", 1, null=True),
    "evaluation.linear.protocol": word(
        "of the linear probe", registry("evaluation.linear:PROTOCOLS"), null=True
    ),
    "knn_eval.enabled": flag("solo-learn's kNN while training", null=True),
    "knn_eval.k": whole("number of its neighbours", 1, null=True),
    "knn_eval.distance_func": word("between features", ("euclidean", "cosine"), null=True),
    "performance.compile": flag("torch.compile of the encoder", also=COMPILE, null=True),
    "performance.cuda_graph": flag("replay the meta step as one CUDA graph", null=True),
    "performance.matmul_precision": word(
        "high allows TF32", registry("methods.task_method:MATMUL_PRECISIONS"), null=True
    ),
    "performance.disable_channel_last": flag("the memory layout of images", null=True),
    "wandb.enabled": flag("log to Weights & Biases", null=True),
    "wandb.project": text("where the run is listed", null=True),
    "wandb.entity": text("user or team", null=True),
    "wandb.offline": flag("log to files alone", null=True),
    "auto_umap.enabled": flag("solo-learn's", null=True, unused=True),
    "auto_umap.dir": text("solo-learn's", null=True, unused=True),
    "auto_umap.frequency": whole("solo-learn's", 1, null=True, unused=True),
    "momentum.base_tau": number("solo-learn's methods alone", 0, 1, null=True, unused=True),
    "momentum.final_tau": number("solo-learn's methods alone", 0, 1, null=True, unused=True),
    "momentum.classifier": flag("solo-learn's methods alone", null=True, unused=True),
}

REQUIRED = (
    "method",
    "backbone.name",
    "data.dataset",
    "optimizer.name",
    "optimizer.batch_size",
    "optimizer.lr",
    "scheduler.name",
    "augmentations",
)
"""What has no default."""


def trainer_settings() -> dict[str, Setting]:
    """Lightning's other keys: solo-learn hands them all to its Trainer, we those of :data:`RUN`."""
    from lightning.pytorch import Trainer  # brings torch with it

    keys = [key for key in inspect.signature(Trainer.__init__).parameters if key != "self"]
    return {key: Setting("Lightning's, through solo-learn", unused=True) for key in keys if key not in RUN}


def pretraining_schema() -> Mapping[str, Setting]:
    """All keys of a pretraining config but ``method_kwargs``."""
    return {**RUN, **BLOCKS, **trainer_settings(), "method_kwargs": block("of the method", null=True)}


def as_markdown(table: Mapping[str, Setting], defaults: Mapping[str, Any] | None = None) -> str:
    """A table for the documentation: key, values, default, meaning.

    Args:
        table: settings by key.
        defaults: by key; a key that is not in it has none.
    """
    lines = ["| key | values | default | |", "|---|---|---|---|"]
    for key, setting in table.items():
        if not setting.unused:
            default = f"`{_as_typed(defaults[key])}`" if defaults and key in defaults else ""
            lines.append(f"| `{key}` | {_values(setting)} | {default} | {setting.meaning} |")
    return "\n".join(lines)


_KINDS = {"whole": "integer", "folder name": "name", "mask": "path or list"}


def _as_typed(value: Any) -> str:
    return "null" if value is None else str(value).replace("'", "").replace(" ", "") or '""'


def _values(setting: Setting) -> str:
    kinds = {"word": ", ".join(f"`{option}`" for option in setting.options), "any": "", "flag": "True, False"}
    limits = setting.range()
    parts = [kinds.get(setting.kind, f"{_KINDS.get(setting.kind, setting.kind)} {limits}".strip())]
    parts += [f"`{other}`" for other in setting.others] + (["null"] if setting.null else [])
    return ", ".join(part for part in parts if part)
