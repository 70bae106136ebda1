"""Settings that are right one by one and cannot be together: one line for each, before any work."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.cli.devices import device_count, device_type
from metamask_plugin.data.registry import evaluation_resize
from metamask_plugin.errors import UserError, check, nearest
from metamask_plugin.host.solo_settings import is_solo_task
from metamask_plugin.tasks import TASKS
from metamask_plugin.tasks.base import MomentumTask

WITH_BOXES = ("confounded_digits", "tiny_imagenet", "coco")
PRECISIONS = (
    *("64-true", "32-true", "16-true", "bf16-true", "16-mixed", "bf16-mixed"),
    *("64", "32", "16", "bf16", "transformer-engine", "transformer-engine-float16"),
)
"""Lightning's."""
HALF = ("bf16-true", "16-true")
DOWNLOADS = ("cifar10", "cifar100", "stl10")
WITH_MOMENTUM = ("sgd", "lars")
"""Optimisers that keep a momentum buffer."""
MOST_PROCESSES = 1024


def check_together(cfg: DictConfig, kwargs: DictConfig | None) -> None:
    """Raises a UserError for the first contradiction.

    Args:
        cfg: the complete config, each of its values valid.
        kwargs: ``method_kwargs`` over their preset; None for a method of others.
    """
    _machine(cfg)
    _data(cfg)
    _schedule(cfg)
    _checkpoints(cfg)
    if kwargs is not None:
        _task(cfg, kwargs)
        if "meta" in kwargs and kwargs.meta.enabled:
            _meta(cfg, kwargs.meta)


def _machine(cfg: DictConfig) -> None:
    kind, count = device_type(cfg.accelerator), device_count(cfg)
    check(1 <= count <= MOST_PROCESSES, "devices", "at least one", cfg.devices)
    if kind == "cuda":
        there = torch.cuda.device_count()
        check(count <= there, "devices", f"at most the {there} GPUs of this machine", cfg.devices)
    elif OmegaConf.is_list(cfg.devices) and len(cfg.devices) > 1:
        several = len(cfg.devices)
        print(
            f"note: devices={list(cfg.devices)} names GPUs: one process trains here, on {kind.upper()}; "
            f"devices={several} makes {several} processes",
            file=sys.stderr,
        )
    if kind == "mps":
        _on_mps(cfg, count)
    name = cfg.strategy
    if isinstance(name, str) and name not in ("auto", *StrategyRegistry.available_strategies()):
        hint = nearest(name, StrategyRegistry.available_strategies())
        remedy = f"did you mean {hint!r}?" if hint else "take auto or ddp"
        check(False, "strategy", "one of Lightning's", name, remedy)
    precision = cfg.precision
    known = precision is None or (not isinstance(precision, bool) and str(precision) in PRECISIONS)
    if not known:
        hint = nearest(precision, PRECISIONS)
        raise UserError(
            f"precision={precision!r} must be one of {', '.join(PRECISIONS)}"
            + (f"; did you mean {hint!r}?" if hint else "")
        )
    if kind == "cpu" and str(precision) in ("16", "16-mixed", "16-true"):
        # Lightning has no 16-mixed there; 16-true has no gradient scaler and is NaN after a step
        check(False, "precision", "another than 16-mixed and 16-true on the CPU", precision,
              "set precision=32-true or bf16-mixed")  # fmt: skip
    deterministic = cfg.get("deterministic")
    check(
        not (deterministic and cfg.get("benchmark")),
        "benchmark",
        "False with deterministic, since the search for the fastest algorithm is not",
        cfg.get("benchmark"),
    )
    clipped = cfg.get("gradient_clip_val")
    algorithm = cfg.get("gradient_clip_algorithm")
    check(
        algorithm is None or clipped is not None,
        "gradient_clip_algorithm",
        "left out without gradient_clip_val",
        algorithm,
        "set gradient_clip_val",
    )
    limit = cfg.get("limit_train_batches")
    valid = limit is None or (
        isinstance(limit, int | float)
        and not isinstance(limit, bool)
        and (1 <= limit <= 10**9 if isinstance(limit, int) else 0 < limit <= 1)
    )
    check(valid, "limit_train_batches", "an integer >= 1, or a share in (0, 1] as a float", limit)


def _on_mps(cfg: DictConfig, count: int) -> None:
    """Refuses what Apple's GPUs do not have: float64, and a second device."""
    remedy = "set accelerator=cpu"
    check(count == 1, "devices", "1 with accelerator=mps", cfg.devices, remedy)
    double = str(cfg.precision) in ("64", "64-true")
    check(not double, "precision", "another than 64-true with accelerator=mps", cfg.precision, remedy)
    task = OmegaConf.select(cfg, "method_kwargs.task")
    remedy = "it computes in float64, which MPS does not have; set accelerator=cpu"
    in_double = task == "wmse" or is_solo_task(task)
    check(not in_double, "method_kwargs.task", "one without float64 with accelerator=mps", task, remedy)
    print("note: accelerator=mps has not been tested by the authors", file=sys.stderr)


def _data(cfg: DictConfig) -> None:
    data, name = cfg.data, cfg.data.dataset
    region = data.get("region") or "full"
    check(
        region == "full" or name in (*WITH_BOXES, "custom"),
        "data.region",
        f"full for {name}, which has no foreground boxes",
        region,
        f"take one of {', '.join(WITH_BOXES)}",
    )
    dali = data.get("format") == "dali"
    check(not dali or data.get("pipeline") is None, "data.pipeline", "left out with data.format=dali",
          data.get("pipeline"))  # fmt: skip
    check(not dali or region == "full", "data.region", "full with data.format=dali", region)
    check(not dali or data.get("bits") is None, "data.bits", "null with data.format=dali", data.get("bits"))
    evaluation_resize(name, cfg.augmentations[0].crop_size, data.get("evaluation_resize"))
    on_device = data.get("on_device")
    pipeline = data.get("pipeline")
    check(
        not on_device or not (dali or pipeline == "torchvision"),
        "data.on_device",
        f"False or left out with the pipeline {'dali' if dali else pipeline}",
        on_device,
        "its images are files, or views made by workers; set data.pipeline=kornia",
    )
    check(
        not data.download or name in DOWNLOADS,
        "data.download",
        f"False for {name}, which cannot be fetched from here",
        data.download,
    )
    check(
        not (data.no_labels and cfg.method == "supervised"),
        "data.no_labels",
        "False with method=supervised: there is nothing to learn without labels",
        data.no_labels,
    )
    check(
        not (data.no_labels and OmegaConf.select(cfg, "knn_eval.enabled")),
        "knn_eval.enabled",
        "False with data.no_labels=True: neighbours have no classes then",
        True,
    )
    for index, entry in enumerate(cfg.augmentations):
        for key, most in (("crop_size", 8192), ("num_crops", 1000)):
            value = entry.get(key, 1)
            check(value <= most, f"augmentations[{index}].{key}", f"<= {most}", value)


def _schedule(cfg: DictConfig) -> None:
    scheduler = cfg.scheduler
    steps = scheduler.get("lr_decay_steps")
    if scheduler.name == "step":
        check(bool(steps), "scheduler.lr_decay_steps", "a list of epochs for scheduler.name='step'", steps)
        positive = all(step >= 0 for step in steps)
        check(positive, "scheduler.lr_decay_steps", "epochs >= 0 for scheduler.name='step'", list(steps))
    warmup = scheduler.get("warmup_epochs")
    if scheduler.name == "warmup_cosine" and warmup is not None and warmup > cfg.max_epochs:
        # a shortened run of a long config is a usual thing to try; but it must not go unseen
        print(
            f"warning: scheduler.warmup_epochs={warmup} is longer than max_epochs={cfg.max_epochs}: the "
            "learning rate never reaches its full value; lower scheduler.warmup_epochs",
            file=sys.stderr,
        )


def _checkpoints(cfg: DictConfig) -> None:
    every = OmegaConf.select(cfg, "checkpoint.every_n_steps")
    check(
        every is None or cfg.checkpoint.enabled,
        "checkpoint.every_n_steps",
        "null with checkpoint.enabled=False",
        every,
    )
    folder = Path(cfg.checkpoint.dir)
    there = next((parent for parent in (folder, *folder.parents) if os.path.lexists(parent)), Path("."))
    remedy = "set another checkpoint.dir"
    check(there.is_dir(), "checkpoint.dir", "a folder", str(there), remedy)
    writable = os.access(there, os.W_OK | os.X_OK)
    check(writable, "checkpoint.dir", "a folder that can be written", str(there), remedy)


def _task(cfg: DictConfig, kwargs: DictConfig) -> None:
    settings = kwargs.get("task_kwargs") or {}
    momentum = isinstance(TASKS.get(kwargs.task), type) and issubclass(TASKS[kwargs.task], MomentumTask)
    check(
        not (momentum and str(cfg.precision) in HALF),
        "precision",
        f"32-true or bf16-mixed for the task {kwargs.task}: 16 bits cannot hold its target network's steps",
        cfg.precision,
    )
    large = cfg.data.num_large_crops
    if kwargs.task == "cmc":
        check(large == 2, "augmentations", "pipelines of 2 large crops together for the task cmc", large)
    if kwargs.task == "wmse" and settings.get("eps") == 0:
        batch = cfg.optimizer.batch_size * max(1, device_count(cfg) * cfg.num_nodes)
        size = min(batch, settings.get("whitening_size", 128))
        dims = settings.get("proj_output_dim", 64)
        check(
            size > dims,
            "method_kwargs.task_kwargs.proj_output_dim",
            f"smaller than the {size} images of a slice (whitening_size, optimizer.batch_size) with eps 0",
            dims,
        )


def _meta(cfg: DictConfig, meta: DictConfig) -> None:
    name, main = "method_kwargs.meta", cfg.optimizer.name
    check(
        meta.trial != "plain" or meta.inner_lr is not None or main == "sgd",
        f"{name}.inner_lr",
        f"set for trial=plain when optimizer.name is {main}: its learning rate is not the length of a "
        "gradient step",
        None,
        f"set ++{name}.inner_lr=auto",
    )
    check(
        meta.trial != "momentum" or main in WITH_MOMENTUM,
        f"{name}.trial",
        f"plain when optimizer.name is {main}; only SGD and LARS keep a momentum buffer",
        meta.trial,
    )
    check(
        meta.schedule != "shared" or str(cfg.precision) not in ("16", "16-mixed"),
        f"{name}.schedule",
        "iteration or epoch with precision=16-mixed, whose scaled gradients it would have to share",
        meta.schedule,
    )
    processes = device_count(cfg) * cfg.num_nodes
    check(
        processes == 1 or meta.estimator != "unrolled",
        f"{name}.estimator",
        "another than unrolled where several processes train",
        meta.estimator,
        "exact is equal to it",
    )
    check(
        processes == 1 or not cfg.get("sync_batchnorm"),
        "sync_batchnorm",
        "False with a meta step",
        True,
        "SyncBatchNorm has no second derivative; the heads see the joint batch without it",
    )
