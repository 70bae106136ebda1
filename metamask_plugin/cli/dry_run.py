"""Everything that a config builds, built once without memory: what cannot be is found before any work."""

import inspect
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
import torchvision
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin import host
from metamask_plugin.bilevel import ESTIMATORS
from metamask_plugin.cli.machine import check_together, processes
from metamask_plugin.config.messages import unknown_key
from metamask_plugin.config.methods import METHOD_KWARGS, DataKwargs, TaskKwargs
from metamask_plugin.config.signatures import check_keywords
from metamask_plugin.data.datasets.coco import coco_splits
from metamask_plugin.data.datasets.confounded_digits import confounded_digits
from metamask_plugin.data.datasets.digits import digits
from metamask_plugin.data.memory import check_generated, memory
from metamask_plugin.errors import UserError, check, choose, shown
from metamask_plugin.host.optimizers import build_optimizer
from metamask_plugin.host.solo_settings import is_solo_task
from metamask_plugin.methods import METHODS
from metamask_plugin.methods.base import original_pipeline
from metamask_plugin.methods.icl_msr import needs_regularizer
from metamask_plugin.methods.meta_checks import check_inner_step, check_run
from metamask_plugin.modules.encoder_reach import (
    patch_size,
    refusal,
    unseen_beyond_tolerance,
    unseen_border,
    without_zeros,
)
from metamask_plugin.modules.encoders import ENCODERS, build_encoder
from metamask_plugin.tasks import TASKS

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
            check_inner_step(meta, main)
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
    if getattr(model, "meta", None) is not None:
        check_run(model.meta.cfg, model, str(cfg.precision), processes(cfg))
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


GENERATED = {"digits": digits, "confounded_digits": confounded_digits, "coco": coco_splits}


def check_task_kwargs(task: str, given: Mapping[str, Any]) -> None:
    """``method_kwargs.task_kwargs``; solo-learn's methods check theirs themselves."""
    if not is_solo_task(task):
        choose("method_kwargs.task", task, TASKS)
        check_keywords("method_kwargs.task_kwargs", given, TASKS[task], TaskKwargs, ("features_dim",))


def check_data_kwargs(dataset: str, given: Mapping[str, Any]) -> None:
    """``data.kwargs``; data sets that take none leave them aside, so that ``data.dataset`` can be changed."""
    if dataset in GENERATED:
        check_keywords("data.kwargs", given, GENERATED[dataset], DataKwargs, ("train_path", "val_path"))


def check_optimizer_kwargs(name: str, kwargs: Mapping[str, Any], block: str) -> torch.optim.Optimizer:
    """Builds the optimiser for two small parameters, and steps it.

    Args:
        name: the optimiser's.
        kwargs: as in the config.
        block: ``optimizer``, or another's name.

    Returns:
        The optimiser.
    """
    groups = [{"params": [torch.nn.Parameter(torch.ones(size)) for size in ((3, 2), (2,))]}]
    try:
        optimizer = build_optimizer(name, groups, 1e-3, 1e-4, dict(kwargs))
        for _ in range(2):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    except Exception as error:  # whatever torch says of the user's values
        raise _do_not_fit(block, name, kwargs, error) from None
    return optimizer


def check_encoder(block: str, name: str, kwargs: Mapping[str, Any], sizes: Iterable[int]) -> int | None:
    """Builds the encoder without memory, and runs images of every size through it.

    Args:
        block: ``backbone``, or another's name.
        name: the encoder's.
        kwargs: as in the config.
        sizes: sides of the images, pixels; the first is what it is built for.

    Returns:
        The side of its patches, pixels; None without them.

    Raises:
        UserError: for an encoder that cannot be built, cannot take an image, or gives no vector of features.
    """
    sizes = list(dict.fromkeys(sizes))
    if host.name == "solo" and name not in ENCODERS and block == "backbone":
        return None  # solo-learn's own factories
    kwargs = dict(kwargs)
    size = kwargs.pop("image_size", sizes[0])
    whole = isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= 8192
    check(whole, f"{block}.kwargs.image_size", "an integer >= 1 and <= 8192", size)
    if name in ENCODERS:
        known = _encoder_arguments(name)
        for key in kwargs:
            if key not in known:
                raise unknown_key(f"{block}.kwargs", key, known)
    offline = {**kwargs, "pretrained": False} if kwargs.get("pretrained") else kwargs
    try:
        shape, features, patch = _output(name, size, sizes, block, offline, "meta")
    except UserError:
        raise
    except Exception:  # some encoders cannot be built without memory: once more, with it
        try:
            shape, features, patch = _output(name, size, sizes, block, offline, "cpu")
        except UserError:
            raise
        except Exception as error:
            raise _do_not_fit(block, name, kwargs, error, f" and images of {sizes} pixels") from None
    fits, remedy = tuple(shape) == (2, features), "name another model, or one without a feature map as output"
    check(
        fits,
        f"{block}.name={name!r}",
        "an encoder with one vector of features an image",
        tuple(shape),
        remedy,
    )
    return patch


def check_encoder_reach(block: str, name: str, kwargs: Mapping[str, Any], sizes: Mapping[int, str]) -> None:
    """Builds the encoder and looks, by a backward pass, whether images of every size matter to their borders.

    Args:
        block: ``backbone``, or another's name.
        name: the encoder's.
        kwargs: as in the config.
        sizes: the config key of each side in pixels; the first is what the encoder is built for.

    Raises:
        UserError: for an encoder that does not see the border of its images.
    """
    if host.name == "solo" and name not in ENCODERS and block == "backbone":
        return
    given = {key: value for key, value in kwargs.items() if key not in ("image_size", "pretrained")}
    size = kwargs.get("image_size") or next(iter(sizes))
    with torch.random.fork_rng(devices=[]):
        encoder = without_zeros(build_encoder(name, size, setting=block, **given))
        for side, setting in sizes.items():
            unseen = unseen_border(encoder, side)
            if unseen_beyond_tolerance(encoder, side, unseen):
                patch = None if "image_size" in kwargs else _patch_that_fits(name, side, given, encoder)
                also = f", or {block}.kwargs.patch_size={patch}" if patch else ""
                raise refusal(encoder, side, unseen, setting, also)
            if unseen:
                print(
                    f"note: {block}.name={name} does not see the outer {unseen} pixels of {setting}={side}",
                    file=sys.stderr,
                )


def _patch_that_fits(name: str, side: int, kwargs: Mapping[str, Any], encoder: nn.Module) -> int | None:
    """The largest smaller patch with which the encoder can be built and sees the whole image."""
    patch = patch_size(encoder) or 0
    for smaller in range(patch - 1, 1, -1):
        if side % smaller == 0:
            with suppress(Exception):
                other = without_zeros(build_encoder(name, side, **{**kwargs, "patch_size": smaller}))
                if patch_size(other) == smaller and unseen_border(other, side) == 0:
                    return smaller
    return None


def _output(
    name: str, size: int, sizes: list[int], block: str, kwargs: Mapping[str, Any], device: str
) -> tuple[torch.Size, int, int | None]:
    with torch.device(device), torch.no_grad():
        encoder = build_encoder(name, size, setting=block, **kwargs)
        for side in sizes:
            output = encoder(torch.zeros(2, 3, side, side))
    return output.shape, encoder.num_features, patch_size(encoder)


def _encoder_arguments(name: str) -> set[str]:
    builder = ENCODERS[name]
    known = set(inspect.signature(builder).parameters) - {"kwargs"}
    if name.startswith("resnet"):  # the rest goes to torchvision's
        known |= set(inspect.signature(torchvision.models.ResNet.__init__).parameters)
        known -= {"self", "block", "layers", "num_classes"}
    return known


def _do_not_fit(
    block: str, name: str, kwargs: Mapping[str, Any], error: Exception, also: str = ""
) -> UserError:
    if isinstance(error, UserError):
        return UserError(
            str(error).replace("optimizer.", f"{block}.") if block != "optimizer" else str(error)
        )
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return UserError(f"{block}.kwargs {shown(dict(kwargs))}{also} do not fit {block}.name={name!r}: {reason}")
