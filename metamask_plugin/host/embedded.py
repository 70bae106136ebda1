"""The embedded host: what our methods need of solo-learn, where solo-learn is not installed.

Written from the contract, on lightning, timm, torchvision and torchmetrics. Where it differs from
solo-learn it does so on purpose: docs/solo_learn.md lists each difference and its reason.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DistributedSampler

from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.features import top_hits
from metamask_plugin.evaluation.knn import WeightedKNNClassifier
from metamask_plugin.host.contract import DEFAULTS, REQUIRED_KEYS
from metamask_plugin.host.optimizers import build_optimizer, build_scheduler, without_decay_on_vectors
from metamask_plugin.modules.encoders import ENCODERS, build_encoder, release_kwargs

__all__ = ["METHODS", "BaseMethod", "put_backbone", "release_kwargs"]

METHODS: dict[str, type] = {}


def put_backbone(name: str, backbone: nn.Module) -> None:
    """Makes ``backbone.name: <name>`` mean this very module."""
    ENCODERS[name] = lambda image_size: backbone


def topk_accuracy(logits: torch.Tensor, targets: torch.Tensor, k: int) -> torch.Tensor:
    """Share of the labelled images whose target is among the k largest logits, percent; 0 without any.

    Images without a label have the target -1.
    """
    return top_hits(logits, targets)[:, :k].sum() / _labelled(targets) * 100


def _labelled(targets: torch.Tensor) -> torch.Tensor:
    """Number of images with a label, at least 1: a divisor, and no question to the device."""
    return (targets != -1).sum().clamp(min=1)


class BaseMethod(pl.LightningModule):
    """Backbone, online linear classifier, optimiser, schedule and online kNN around a method's loss.

    Subclasses add their parameters in :attr:`learnable_params`, their outputs in :meth:`forward` and
    their loss in :meth:`training_step`; each extends what ``super()`` returns.

    Args:
        cfg: solo-learn's configuration; see :mod:`metamask_plugin.host.contract` for the keys.
    """

    def __init__(self, cfg: DictConfig):
        super().__init__()
        cfg = self.add_and_assert_specific_cfg(cfg)
        self.cfg = cfg

        kwargs = OmegaConf.to_container(cfg.backbone.kwargs)
        image_size = kwargs.pop("image_size", OmegaConf.select(cfg, "augmentations[0].crop_size", default=32))
        self.backbone = build_encoder(cfg.backbone.name, image_size, **kwargs)
        self.features_dim: int = self.backbone.num_features
        self.num_classes: int = cfg.data.num_classes
        self.classifier = nn.Linear(self.features_dim, self.num_classes)

        self.max_epochs: int = cfg.max_epochs
        self.scheduler: str = cfg.scheduler.name
        self.num_large_crops: int = cfg.data.num_large_crops
        self.num_small_crops: int = cfg.data.num_small_crops
        self.num_crops: int = self.num_large_crops + self.num_small_crops
        self.multicrop: bool = self.num_small_crops > 0
        self.no_channel_last: bool = cfg.performance.disable_channel_last
        # with gradient accumulation one step averages over more samples: the rates grow with it
        accumulated = cfg.accumulate_grad_batches or 1
        self.lr: float = cfg.optimizer.lr * accumulated
        self.classifier_lr: float = cfg.optimizer.classifier_lr * accumulated
        self.min_lr: float = cfg.scheduler.min_lr * accumulated
        self.warmup_start_lr: float = cfg.scheduler.warmup_start_lr * accumulated

        self.knn_eval: bool = cfg.knn_eval.enabled
        if self.knn_eval:
            self.knn = WeightedKNNClassifier(k=cfg.knn_eval.k, distance_fx=cfg.knn_eval.distance_func)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Fills in defaults, in place.

        Raises:
            UserError: for a missing key or a value that cannot be.
        """
        for key in REQUIRED_KEYS:
            check(OmegaConf.select(cfg, key) is not None, key, "set", None, "add it to the config")
        for key, value in DEFAULTS.items():
            if OmegaConf.select(cfg, key) is None and value is not None or OmegaConf.is_missing(cfg, key):
                OmegaConf.update(cfg, key, value, force_add=True)
        if OmegaConf.select(cfg, "scheduler.lr_decay_steps") is None:
            OmegaConf.update(cfg, "scheduler.lr_decay_steps", None, force_add=True)
        choose("scheduler.interval", cfg.scheduler.interval, ("step", "epoch"))
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        return [
            {"name": "backbone", "params": list(self.backbone.parameters())},
            {
                "name": "classifier",
                "params": list(self.classifier.parameters()),
                "lr": self.classifier_lr,
                "weight_decay": 0.0,
            },
        ]

    def configure_optimizers(self):
        cfg, groups = self.cfg, self.learnable_params
        if cfg.optimizer.exclude_bias_n_norm_wd:
            groups = without_decay_on_vectors(groups)
        optimizer = build_optimizer(
            cfg.optimizer.name,
            groups,
            self.lr,
            cfg.optimizer.weight_decay,
            OmegaConf.to_container(cfg.optimizer.kwargs),
        )
        by_step = cfg.scheduler.interval == "step" and self.scheduler == "warmup_cosine"
        total = self.trainer.estimated_stepping_batches if by_step else self.max_epochs
        scheduler = build_scheduler(
            self.scheduler,
            optimizer,
            warmup=cfg.scheduler.warmup_epochs * (total / self.max_epochs),
            total=total,
            warmup_start_lr=self.warmup_start_lr,
            min_lr=self.min_lr,
            lr_decay_steps=cfg.scheduler.lr_decay_steps,
        )
        if scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": scheduler, "interval": "step" if by_step else "epoch"}]

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Features (N, features_dim) and, on them detached, the online classifier's logits."""
        if not self.no_channel_last:
            X = X.to(memory_format=torch.channels_last)
        feats = self.backbone(X)
        return {"logits": self.classifier(feats.detach()), "feats": feats}

    def _classify(self, X: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
        """Outputs for the images X; loss and accuracies of as many of them as there are targets."""
        out = self(X)
        logits = out["logits"][: len(targets)]
        total = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        out["loss"] = total / _labelled(targets)  # 0 where no image has a label
        out["acc1"], out["acc5"] = topk_accuracy(logits, targets, 1), topk_accuracy(logits, targets, 5)
        return out

    def training_step(self, batch: list, batch_idx: int) -> dict[str, Any]:
        """Runs every view through the backbone and trains the online classifier.

        Args:
            batch: ``[indexes, views, targets]``; see :mod:`metamask_plugin.host.contract`.
            batch_idx: unused.

        Returns:
            ``loss``, ``acc1``, ``acc5``: means over the large views; whatever :meth:`forward` gives
            (``feats``, ``logits``): lists, one entry a view.
        """
        _, views, targets = batch
        views = [views] if isinstance(views, torch.Tensor) else views
        check(len(views) == self.num_crops, "augmentations", f"{self.num_crops} views a sample", len(views))

        large = [self._classify(x, targets) for x in views[: self.num_large_crops]]
        small = [self(x) for x in views[self.num_large_crops :]]
        outs = {key: [out[key] for out in large + small if key in out] for key in large[0]}
        for key in ("loss", "acc1", "acc5"):
            outs[key] = sum(out[key] for out in large) / len(large)
        metrics = {"train_class_loss": outs["loss"], "train_acc1": outs["acc1"], "train_acc5": outs["acc5"]}
        # an epoch's mean is over its labelled images, of which batches have more or fewer; 0 without any
        weight = (targets != -1).sum().float().clamp(min=1e-6)
        self.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=weight)

        if self.knn_eval:
            labelled = targets.repeat(self.num_large_crops)
            known = labelled != -1
            bank = torch.cat([out["feats"] for out in large])[known].detach()
            self.knn(train_features=bank, train_targets=labelled[known])
        return outs

    def validation_step(self, batch: list, batch_idx: int) -> None:
        """Online classifier and kNN on un-augmented images; ``batch`` is ``[X, targets]``."""
        X, targets = batch
        targets = targets[: self._not_repeated(batch_idx)]
        out = self._classify(X, targets)
        if self.knn_eval and not self.trainer.sanity_checking:
            self.knn(test_features=out["feats"][: len(targets)].detach(), test_targets=targets)
        metrics = {"val_loss": out["loss"], "val_acc1": out["acc1"], "val_acc5": out["acc5"]}
        self.log_dict(metrics, on_epoch=True, sync_dist=True, batch_size=len(targets))

    def _not_repeated(self, batch_idx: int) -> int | None:
        """How many images of this and later batches count; None: all.

        With several processes, Lightning's sampler repeats images until all processes have equally many.
        """
        loader = self.trainer.val_dataloaders
        sampler = getattr(loader, "sampler", None)
        if not isinstance(sampler, DistributedSampler):
            return None
        own = len(range(sampler.rank, len(sampler.dataset), sampler.num_replicas))
        return max(0, own - batch_idx * loader.batch_size)

    def on_validation_epoch_end(self) -> None:
        if self.knn_eval and not self.trainer.sanity_checking:
            acc1, acc5 = self.knn.compute()
            self.knn.reset()
            self.log_dict({"val_knn_acc1": acc1, "val_knn_acc5": acc5}, sync_dist=True)
