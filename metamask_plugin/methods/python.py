"""Methods without a config: what a Python caller says in keywords, as the config that hosts read."""

from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.errors import check
from metamask_plugin.host import put_backbone

GIVEN = "given"
"""Name of an encoder that was handed over as a module."""


def config_of(
    method: str,
    backbone: nn.Module,
    task: str = "simclr",
    *,
    task_kwargs: dict[str, Any] | None = None,
    num_classes: int = 1,
    views: int = 2,
    image_size: int = 32,
    original_size: int | None = None,
    batch_size: int = 256,
    max_epochs: int = 100,
    optimizer: str = "adamw",
    optimizer_kwargs: dict[str, Any] | None = None,
    lr: float = 1e-3,
    weight_decay: float = 1e-4,
    scheduler: str = "warmup_cosine",
    warmup_epochs: float = 0,
    **method_kwargs: Any,
) -> DictConfig:
    """The config of a method on an encoder.

    Args:
        method: a registered name.
        backbone: images (N, 3, H, W) to features (N, D), with an attribute ``num_features``, D.
        task: fills the task's loss, see ``metamask-ssl list tasks``.
        task_kwargs: the task's settings.
        num_classes: of the labels, for the online classifier; images without a label have the label -1.
        views: augmented images of a sample.
        image_size: their side, pixels.
        original_size: side of the un-augmented image that comes after the views, pixels; None without one.
            ICL-MSR needs it.
        batch_size: images of a batch.
        max_epochs: of the training.
        optimizer: ``sgd``, ``lars``, ``adam`` or ``adamw``.
        optimizer_kwargs: of its constructor.
        lr: learning rate of encoder, heads and online classifier, as it is.
        weight_decay: of encoder and heads.
        scheduler: ``warmup_cosine``, ``step``, ``none`` or ``warmup_step``.
        warmup_epochs: of ``warmup_cosine``.
        method_kwargs: the method's settings, see docs/keys.md.

    Raises:
        UserError: for an encoder without ``num_features``.
    """
    check(
        isinstance(getattr(backbone, "num_features", None), int),
        "backbone",
        "an encoder with an integer num_features, the length of its features",
        type(backbone).__name__,
        "set backbone.num_features",
    )
    put_backbone(GIVEN, backbone)
    pipelines = [{"crop_size": image_size, "num_crops": views}]
    if original_size is not None:
        check(original_size != image_size, "original_size", "another than image_size", original_size)
        pipelines.append({"crop_size": original_size, "num_crops": 1})
    return OmegaConf.create(
        {
            "method": method,
            "backbone": {"name": GIVEN},
            "data": {
                "dataset": "custom",
                "num_classes": num_classes,
                "num_large_crops": views,
                "num_small_crops": len(pipelines) - 1,
            },
            "augmentations": pipelines,
            "max_epochs": max_epochs,
            "optimizer": {
                "name": optimizer,
                "batch_size": batch_size,
                "lr": lr,
                "classifier_lr": lr,
                "weight_decay": weight_decay,
                "kwargs": optimizer_kwargs or {},
            },
            "scheduler": {"name": scheduler, "warmup_epochs": warmup_epochs},
            "performance": {"disable_channel_last": True},
            "method_kwargs": {"task": task, "task_kwargs": task_kwargs or {}, **method_kwargs},
        }
    )
