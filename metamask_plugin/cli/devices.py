"""How many devices a config asks for, and of which kind."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.errors import UserError, check


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
        return 1 if on_cpu(cfg) else len(devices)
    if isinstance(devices, bool) or not isinstance(devices, int | str):
        raise wanted
    text = str(devices)[:1000].strip()
    if text in ("auto", "-1"):
        return 1 if on_cpu(cfg) else max(1, torch.cuda.device_count())
    try:
        return int(text) if "," not in text else len([int(part) for part in text.split(",") if part.strip()])
    except ValueError:
        raise wanted from None


def on_cpu(cfg: DictConfig) -> bool:
    """Whether this run will use the CPU, asked for or for want of anything else."""
    return cfg.accelerator == "cpu" or (cfg.accelerator == "auto" and not torch.cuda.is_available())
