"""How many devices a config asks for, and of which kind."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.errors import UserError, check, choose

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
