"""What this machine, the files, the task and the meta step cannot do together: one line, before any work."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.data.registry import evaluation_resize
from metamask_plugin.errors import UserError, check, choose, nearest
from metamask_plugin.host.solo_settings import is_solo_task
from metamask_plugin.tasks import TASKS
from metamask_plugin.tasks.base import MomentumTask

HALF = ("bf16-true", "16-true")
MOST_PROCESSES = 1024


def check_together(cfg: DictConfig, own: DictConfig, kwargs: DictConfig | None) -> None:
    """Raises a UserError for the first contradiction.

    Args:
        cfg: the complete config, each of its values valid.
        own: what the method is built from.
        kwargs: ``method_kwargs`` over their preset; None for a method of others.
    """
    _machine(cfg)
    evaluation_resize(cfg.data.dataset, cfg.augmentations[0].crop_size, cfg.data.get("evaluation_resize"))
    _schedule(cfg)
    _folder(cfg)
    if kwargs is not None:
        _task(cfg, kwargs, own.data.num_large_crops)
        check(
            not ("meta" in kwargs and kwargs.meta.enabled and cfg.sync_batchnorm and processes(cfg) > 1),
            "sync_batchnorm",
            "False with a meta step",
            True,
            "SyncBatchNorm has no second derivative; the heads see the joint batch without it",
        )


def _machine(cfg: DictConfig) -> None:
    kind, count = device_type(cfg.accelerator), device_count(cfg)
    check(1 <= count <= MOST_PROCESSES, "devices", f"from 1 to {MOST_PROCESSES}", cfg.devices)
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
    if kind == "cpu" and str(precision) in ("16", "16-mixed", "16-true"):
        # Lightning has no 16-mixed there; 16-true has no gradient scaler and is NaN after a step
        check(False, "precision", "another than 16-mixed and 16-true on the CPU", precision,
              "set precision=32-true or bf16-mixed")  # fmt: skip


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


def _schedule(cfg: DictConfig) -> None:
    scheduler = cfg.scheduler
    warmup = scheduler.get("warmup_epochs")
    if scheduler.name == "warmup_cosine" and warmup is not None and warmup > cfg.max_epochs:
        # a shortened run of a long config is a usual thing to try; but it must not go unseen
        print(
            f"warning: scheduler.warmup_epochs={warmup} is longer than max_epochs={cfg.max_epochs}: the "
            "learning rate never reaches its full value; lower scheduler.warmup_epochs",
            file=sys.stderr,
        )


def _folder(cfg: DictConfig) -> None:
    folder = Path(cfg.checkpoint.dir)
    there = next((parent for parent in (folder, *folder.parents) if os.path.lexists(parent)), Path("."))
    remedy = "set another checkpoint.dir"
    check(there.is_dir(), "checkpoint.dir", "a folder", str(there), remedy)
    writable = os.access(there, os.W_OK | os.X_OK)
    check(writable, "checkpoint.dir", "a folder that can be written", str(there), remedy)


def _task(cfg: DictConfig, kwargs: DictConfig, large: int) -> None:
    settings = kwargs.get("task_kwargs") or {}
    momentum = isinstance(TASKS.get(kwargs.task), type) and issubclass(TASKS[kwargs.task], MomentumTask)
    check(
        not (momentum and str(cfg.precision) in HALF),
        "precision",
        f"32-true or bf16-mixed for the task {kwargs.task}: 16 bits cannot hold its target network's steps",
        cfg.precision,
    )
    if kwargs.task == "cmc":
        check(large == 2, "augmentations", "pipelines of 2 large crops together for the task cmc", large)
    if kwargs.task == "wmse" and settings.get("eps") == 0:
        batch = cfg.optimizer.batch_size * processes(cfg)
        size = min(batch, settings.get("whitening_size", 128))
        dims = settings.get("proj_output_dim", 64)
        check(
            size > dims,
            "method_kwargs.task_kwargs.proj_output_dim",
            f"smaller than the {size} images of a slice (whitening_size, optimizer.batch_size) with eps 0",
            dims,
        )


ACCELERATORS = ("auto", "cpu", "gpu", "cuda", "mps")
"""Values of ``accelerator``."""


def device_count(cfg: DictConfig) -> int:
    """How many devices ``devices`` asks for: a list, ``"2"``, ``"0,1"``, 2, -1 or ``auto``."""
    devices: Any = cfg.devices
    wanted = UserError(f"devices must be a number, a list or 'auto', got {devices!r}")
    if OmegaConf.is_list(devices):
        numbers = all(
            isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0 for entry in devices
        )
        check(
            numbers and len(set(devices)) == len(devices) > 0, "devices", "a list like [0, 1]", list(devices)
        )
        return 1 if device_type(cfg.accelerator) != "cuda" else len(devices)
    if isinstance(devices, bool) or not isinstance(devices, int | str):
        raise wanted
    text = str(devices)[:1000].strip()
    if text in ("auto", "-1"):
        return 1 if device_type(cfg.accelerator) != "cuda" else max(1, torch.cuda.device_count())
    try:
        return int(text) if "," not in text else len([int(part) for part in text.split(",") if part.strip()])
    except ValueError:
        raise wanted from None


def processes(cfg: DictConfig) -> int:
    """How many processes train, on all machines together."""
    return device_count(cfg) * cfg.num_nodes


def device_type(accelerator: str) -> str:
    """``cuda``, ``cpu`` or ``mps`` (Apple's GPUs): what is meant by a value of ``accelerator``.

    ``auto`` is CUDA if there is a device, else the CPU. MPS is used only where it is asked for, while
    Lightning's own ``auto`` and ``gpu`` can be MPS.

    Raises:
        UserError: for a device that this machine does not have.
    """
    choose("accelerator", accelerator, ACCELERATORS)
    found = torch.cuda.is_available()
    if accelerator in ("gpu", "cuda"):
        check(found, "accelerator", "auto or cpu where no GPU is found", accelerator, "set accelerator=cpu")
    if accelerator == "mps":
        available, remedy = torch.backends.mps.is_available(), "set accelerator=cpu"
        check(available, "accelerator", "auto or cpu where torch finds no MPS", accelerator, remedy)
    return {"auto": "cuda" if found else "cpu", "gpu": "cuda"}.get(accelerator, accelerator)


def on_cpu(cfg: DictConfig) -> bool:
    """Whether this run uses the CPU, asked for or for want of anything else."""
    return device_type(cfg.accelerator) == "cpu"


def device_title(cfg: DictConfig) -> str:
    """What a run trains on, for the user."""
    kind, count = device_type(cfg.accelerator), device_count(cfg)
    name = {"cpu": "CPU", "mps": "MPS"}.get(kind) or torch.cuda.get_device_name()
    return name if kind != "cuda" and count == 1 else f"{count} x {name}"
