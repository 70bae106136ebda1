"""Everything that a config builds, built once without memory: what cannot be is found before any work."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.bilevel import ESTIMATORS
from metamask_plugin.cli.devices import processes
from metamask_plugin.cli.kwargs_checks import (
    check_data_kwargs,
    check_encoder,
    check_encoder_reach,
    check_optimizer_kwargs,
    check_task_kwargs,
)
from metamask_plugin.cli.machine import check_together
from metamask_plugin.config.methods import METHOD_KWARGS
from metamask_plugin.config.signatures import check_keywords
from metamask_plugin.data.memory import check_generated, memory
from metamask_plugin.errors import UserError, check
from metamask_plugin.methods import METHODS
from metamask_plugin.methods.bilevel_method import BilevelMethod
from metamask_plugin.methods.icl_msr import needs_regularizer
from metamask_plugin.methods.task_method import original_pipeline
from metamask_plugin.methods.trial_steps import check_trial, resolved

COPIES = 2
"""Of the weights, in the machine's memory: the method, and as it was before training."""


def dry_run(cfg: DictConfig, own: DictConfig) -> None:
    """Checks settings against what they are for, and against this machine.

    Args:
        cfg: the complete config; it stays as it is.
        own: what its method is built from.

    Raises:
        UserError: for what cannot be built, cannot go together, or is too large for this machine.
    """
    check_data_kwargs(cfg.data.dataset, _plain(cfg, "data.kwargs"))
    main = check_optimizer_kwargs(cfg.optimizer.name, _plain(cfg, "optimizer.kwargs"), "optimizer")
    if cfg.method not in METHOD_KWARGS:  # solo-learn's methods, and those of others, check theirs themselves
        check_together(cfg, own, None)
        return
    own = METHODS[own.method].add_and_assert_specific_cfg(own)
    kwargs = own.method_kwargs
    check_task_kwargs(kwargs.task, _plain(kwargs, "task_kwargs"))
    if "meta" in kwargs:
        meta = kwargs.meta
        estimator = ESTIMATORS[meta.estimator]
        check_keywords("method_kwargs.meta.estimator_kwargs", _plain(meta, "estimator_kwargs"), estimator)
        check_optimizer_kwargs(
            meta.optimizer.name, _plain(meta, "optimizer.kwargs"), "method_kwargs.meta.optimizer"
        )
        if meta.enabled:
            check_trial(resolved(meta.trial, meta.inner_lr, main), meta.inner_lr, main)
    check_together(cfg, own, kwargs)
    encoders = _encoders(cfg, own)
    patches = [check_encoder(*encoder) for encoder in encoders]
    _check_method(own)
    for encoder, patch in zip(encoders, patches):  # it takes memory and time, which whole patches save
        sides = encoder[-1]
        if patch is None or any(side % patch for side in sides):
            check_encoder_reach(*encoder)


def _encoders(cfg: DictConfig, own: DictConfig) -> list[tuple[str, str, dict[str, Any], dict[int, str]]]:
    """The encoders of a run: block, name, kwargs, and by which key each side of its images is set."""
    original, seen = original_pipeline(own), {}
    for index, entry in enumerate(cfg.augmentations):
        if entry != original:
            seen.setdefault(entry.crop_size, f"augmentations.{index}.crop_size")
    found = [("backbone", cfg.backbone.name, _plain(cfg, "backbone.kwargs"), seen)]
    if "regularizer" in own.method_kwargs and needs_regularizer(own.method_kwargs):
        trunk = own.method_kwargs.regularizer
        key = f"augmentations.{len(cfg.augmentations) - 1}.crop_size"
        given = _plain(trunk, "kwargs")
        found.append(("method_kwargs.regularizer", trunk.name, given, {original.crop_size: key}))
    return found


def _check_method(cfg: DictConfig) -> None:
    """Builds the method without memory: what it refuses, and whether its weights fit into this machine."""
    try:
        with torch.device("meta"):
            model: nn.Module = METHODS[cfg.method](cfg.copy())
    except UserError:
        raise
    except Exception:  # not everything can be built so; where it cannot be at all, training says it
        return
    if isinstance(model, BilevelMethod) and model.meta is not None:
        model.meta.check(str(cfg.precision))
        model.check_processes(processes(cfg))
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
    if cfg.data.dataset in ("digits", "confounded_digits"):
        check_generated(_plain(cfg, "data.kwargs"))


def _plain(cfg: DictConfig, key: str) -> dict[str, Any]:
    value = OmegaConf.select(cfg, key)
    return {} if value is None else OmegaConf.to_container(value, resolve=True)
