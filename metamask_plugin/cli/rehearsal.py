"""Everything that a config builds, built once without memory: what cannot be is found before any work."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.bilevel import ESTIMATORS
from metamask_plugin.cli.contradictions import check_together
from metamask_plugin.cli.free_form import (
    check_data_kwargs,
    check_encoder,
    check_keywords,
    check_optimizer_kwargs,
    check_task_kwargs,
)
from metamask_plugin.cli.schema_methods import METHOD_KWARGS
from metamask_plugin.errors import UserError, check
from metamask_plugin.methods import METHODS
from metamask_plugin.methods.icl_msr import needs_regularizer
from metamask_plugin.methods.task_method import original_pipeline

COPIES = 2
"""Of the weights, in the machine's memory: the method, and as it was before training."""


def rehearse(cfg: DictConfig) -> None:
    """Checks settings against what they are for, and against each other.

    Args:
        cfg: the complete config; it stays as it is.

    Raises:
        UserError: for what cannot be built, cannot go together, or is too large for this machine.
    """
    check_data_kwargs(cfg.data.dataset, _plain(cfg, "data.kwargs"))
    check_optimizer_kwargs(cfg.optimizer.name, _plain(cfg, "optimizer.kwargs"), "optimizer")
    if cfg.method not in METHOD_KWARGS:  # solo-learn's methods, and those of others, check theirs themselves
        check_together(cfg, None)
        return
    own = _completed(cfg)
    kwargs = own.method_kwargs
    check_task_kwargs(kwargs.task, _plain(kwargs, "task_kwargs"))
    if "meta" in kwargs:
        meta = kwargs.meta
        estimator = ESTIMATORS[meta.estimator]
        check_keywords("method_kwargs.meta.estimator_kwargs", _plain(meta, "estimator_kwargs"), estimator)
        check_optimizer_kwargs(
            meta.optimizer.name, _plain(meta, "optimizer.kwargs"), "method_kwargs.meta.optimizer"
        )
    check_together(cfg, kwargs)
    original = original_pipeline(own)
    sizes = [entry.crop_size for entry in cfg.augmentations if entry != original]
    check_encoder("backbone", cfg.backbone.name, _plain(cfg, "backbone.kwargs"), sizes)
    if "regularizer" in kwargs and needs_regularizer(kwargs):
        trunk = kwargs.regularizer
        given = _plain(trunk, "kwargs")
        check_encoder("method_kwargs.regularizer", trunk.name, given, [original.crop_size])
    _check_memory(own)


def _completed(cfg: DictConfig) -> DictConfig:
    """A copy with the method's own defaults, as its constructor fills them in."""
    own = cfg.copy()
    if OmegaConf.select(own, "data.num_classes") is None:
        OmegaConf.update(own, "data.num_classes", 1000, force_add=True)  # known once the data are there
    return METHODS[own.method].add_and_assert_specific_cfg(own)


def _check_memory(cfg: DictConfig) -> None:
    try:
        with torch.device("meta"):
            model: nn.Module = METHODS[cfg.method](cfg.copy())
    except UserError:
        raise
    except Exception:  # not everything can be built so; where it cannot be at all, training says it
        return
    tensors = [*model.parameters(), *model.buffers()]
    needed = COPIES * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    there = memory()
    check(
        there is None or needed <= there,
        "the model",
        f"one whose weights fit twice into this machine's {(there or 0) / 1e9:.0f} GB of memory",
        f"{needed / 1e9:.0f} GB",
        "lower backbone.kwargs, proj_hidden_dim, proj_output_dim or the queue's size",
    )
    images = _generated_bytes(cfg)
    check(
        there is None or images <= there,
        "data.kwargs.size and data.kwargs.copies",
        f"those of images that fit into this machine's {(there or 0) / 1e9:.0f} GB of memory",
        f"{images / 1e9:.0f} GB",
    )


def _generated_bytes(cfg: DictConfig) -> int:
    """What the generated data sets take, as uint8 and once more as they are drawn."""
    given = _plain(cfg, "data.kwargs")
    if cfg.data.dataset not in ("digits", "confounded_digits"):
        return 0
    return 2 * 3 * given.get("size", 32) ** 2 * (1297 * given.get("copies", 1) + 500)


def memory() -> int | None:
    """Bytes that this machine, or the container around this process, has; None where it does not say."""
    found = []
    with suppress(ValueError, OSError, AttributeError):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(ValueError, OSError):
        found.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(found, default=None)


def _plain(cfg: DictConfig, key: str) -> dict[str, Any]:
    value = OmegaConf.select(cfg, key)
    return {} if value is None else OmegaConf.to_container(value, resolve=True)
