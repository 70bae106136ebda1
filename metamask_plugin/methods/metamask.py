"""MetaMask: a meta-learned mask over feature dimensions, beside a redundancy-reduction loss."""

from collections.abc import Iterable
from itertools import combinations
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.bilevel import BilevelProblem, EncoderPass, Functional
from metamask_plugin.errors import check, choose
from metamask_plugin.host import release_kwargs
from metamask_plugin.losses import redundancy_reduction_loss
from metamask_plugin.losses.redundancy_reduction import FORMS
from metamask_plugin.methods.bilevel_method import BilevelMethod, OuterBatch
from metamask_plugin.methods.meta_update import DEFAULTS, MetaUpdate
from metamask_plugin.methods.presets import apply_preset
from metamask_plugin.modules.dimensional_mask import DimensionalMask
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks import Projections

PAPER: dict[str, Any] = {
    "task": "simclr",
    "task_kwargs": {"proj_hidden_dim": 2048, "proj_output_dim": 256, "temperature": 0.5},
    "alpha": 100.0,  # the best of Fig. 6
    "scale_loss": 1.0,
    "redundancy": {
        "weight": 1.0,
        "lamb": 5e-3,  # "valued by following" Barlow Twins
        "form": "uncentred",  # Eq. (3)
        "proj_hidden_dim": 2048,
        "proj_output_dim": 2048,
        "final_norm": False,
    },
    "mask": {"parameterisation": "free", "start": None},
    "meta": {
        **DEFAULTS,
        # the paper does not name the mask's optimiser: at this rate the weights of a mask that
        # starts at 1 spread visibly within an epoch and keep their mean
        "optimizer": {"name": "adam", "lr": 1e-2, "weight_decay": 0.0, "kwargs": {}},
    },
}

OFFICIAL: dict[str, Any] = {
    "task": "simclr",
    "task_kwargs": {
        "proj_hidden_dim": 2048,
        "proj_output_dim": 256,
        "temperature": 0.07,
        "final_norm": True,
    },
    "alpha": 10.0,
    "scale_loss": 1.0,
    "redundancy": {
        "weight": 1.0,
        "lamb": 5e-3,
        "form": "official",
        "proj_hidden_dim": 2048,
        "proj_output_dim": 2048,
        "final_norm": True,
    },
    "mask": {"parameterisation": "sigmoid", "start": None},
    "meta": {
        **DEFAULTS,
        "estimator": "finite_difference",
        "estimator_kwargs": {"r": 1e-2},
        "trial": "momentum",
        "optimizer": {"name": "sgd", "lr": 1e-3, "weight_decay": 5e-4, "kwargs": {"momentum": 0.9}},
        "decay_lr": True,
        "update_statistics": True,
    },
}

PRESETS = {"paper": PAPER, "official": OFFICIAL}


class MetaMask(BilevelMethod):
    """MetaMask on top of any task. Algorithm 1 of [0].

    Regular step, M fixed, over encoder and heads (Eq. 5):

        scale_loss * ( weight * L_drr(g_drr(h * M)) + alpha * L_task(g_task(h * M)) )

    Meta step, on the same batch right after the optimiser's step, over M (Eqs. 6, 7):

        L_task(g_task'(h' * M))   through the trial weights   theta' = theta - l grad L_task

    At test time the mask is not applied (A.4.7).

    Args:
        cfg: the host's configuration; its ``method_kwargs`` are

            - ``preset``: ``paper`` (default) or ``official``, the release's, what the rest defaults to; of
              ``official`` also ``backbone.kwargs.stem``, for our ResNets on images of up to 32 pixels;
            - ``task``, ``task_kwargs``: what fills L_task, and its settings;
            - ``alpha``: Eq. (5), >= 0;
            - ``scale_loss``: factor on the whole regular loss, as solo-learn scales Barlow Twins;
            - ``redundancy``: ``weight`` of L_drr (0 is "without drr", Fig. 10), ``lamb`` (Eq. 2),
              ``form`` (Eq. 3, see :func:`~metamask_plugin.losses.cross_correlation`),
              ``proj_hidden_dim``, ``proj_output_dim``, ``final_norm``;
            - ``mask``: ``parameterisation``, ``free`` or ``sigmoid``; ``start``, D weights to start from (on
              the command line a run or checkpoint to take them from);
            - ``meta``: see :class:`~metamask_plugin.methods.meta_update.MetaUpdate`, and ``enabled``
              (``False`` is "without meta-learning", Fig. 10: M stays 1).

    Raises:
        UserError: for settings that cannot be.

    [0] Li et al., *MetaMask: Revisiting Dimensional Confounder for Self-Supervised Learning*, NeurIPS 2022.
    """

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        kwargs = self.cfg.method_kwargs
        self.redundancy = kwargs.redundancy
        if self.redundancy.weight > 0:
            self.redundancy_head = projection_head(
                self.features_dim,
                self.redundancy.proj_hidden_dim,
                self.redundancy.proj_output_dim,
                layers=3,
                final_norm=self.redundancy.final_norm,
            )
        # without meta-learning there is nothing to parameterise: the mask is all ones
        self.mask = DimensionalMask(
            self.features_dim,
            kwargs.mask.parameterisation if kwargs.meta.enabled else "free",
            kwargs.mask.start,
        )
        self.meta = MetaUpdate(kwargs.meta) if kwargs.meta.enabled else None

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Adds the host's defaults and the preset's, and checks ``method_kwargs``."""
        cfg = super(MetaMask, MetaMask).add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs = kwargs = apply_preset(PRESETS, cfg.method_kwargs)
        if kwargs.preset == "official":
            size = OmegaConf.select(cfg, "backbone.kwargs.image_size")
            size = size or OmegaConf.select(cfg, "augmentations[0].crop_size", default=32)
            cfg.backbone.kwargs = {**release_kwargs(cfg.backbone.name, size), **cfg.backbone.kwargs}
        check(kwargs.alpha >= 0, "method_kwargs.alpha", ">= 0", kwargs.alpha)
        check(kwargs.scale_loss > 0, "method_kwargs.scale_loss", "> 0", kwargs.scale_loss)
        name, redundancy = "method_kwargs.redundancy", kwargs.redundancy
        check(redundancy.weight >= 0, f"{name}.weight", ">= 0", redundancy.weight)
        check(redundancy.lamb >= 0, f"{name}.lamb", ">= 0", redundancy.lamb)
        choose(f"{name}.form", redundancy.form, FORMS)
        return cfg

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds the redundancy head. The mask is not here: it has an optimiser of its own."""
        groups = super().learnable_params
        if self.redundancy.weight > 0:
            groups.append({"name": "redundancy_head", "params": list(self.redundancy_head.parameters())})
        return groups

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Of the masked features, ``z`` in evaluation."""
        out = super().forward(X)
        if not self.training:
            out["z"] = self.task.project(self.mask(out["feats"]))
        return out

    def regular_loss(
        self,
        out: dict[str, list[torch.Tensor]],
        target_feats: list[torch.Tensor] | None,
        original: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[Projections, Projections | None]]:
        """Eq. (5) for one batch, times ``scale_loss``.

        The target branch sees masked features as well, under its stop-gradient.
        """
        masked = [self.mask(h) for h in out["feats"]]
        masked_targets = None if target_feats is None else [self.mask(h) for h in target_feats]
        branches = self.task.branches(masked, masked_targets)
        task_loss = self.task.loss(*branches)
        parts = {"train_task_loss": task_loss}
        loss = self.cfg.method_kwargs.alpha * task_loss
        if self.redundancy.weight > 0:
            redundancy_loss = self._redundancy_loss(masked[: self.num_large_crops])
            parts["train_redundancy_loss"] = redundancy_loss
            loss = loss + self.redundancy.weight * redundancy_loss
        return self.cfg.method_kwargs.scale_loss * loss, parts, branches

    def _redundancy_loss(self, masked: list[torch.Tensor]) -> torch.Tensor:
        """Eq. (2), summed over pairs of views."""
        z = [self.redundancy_head(feats) for feats in masked]
        return sum(
            redundancy_reduction_loss(z1, z2, self.redundancy.lamb, self.redundancy.form)
            for z1, z2 in combinations(z, 2)
        )

    def meta_parameters(self) -> Iterable[nn.Parameter]:
        return self.mask.parameters()

    def meta_state(self) -> dict[str, torch.Tensor]:
        return self.mask.statistics()

    def meta_step(
        self,
        batch: list,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> None:
        """Eqs. (6) and (7): the mask goes down the gradient of the trial weights' loss."""
        views, _ = self.separate(batch[1])
        main, kwargs = self.optimizers(use_pl_optimizer=False), self.cfg.method_kwargs
        trial = self.trial(self.backbone, self.task, kwargs.scale_loss * kwargs.alpha)
        found = self.meta_gradient(trial, views, target_feats=target_feats, encoded=encoded, outer=outer)
        # processes agree on the joint batch's gradient up to rounding; averaged, their masks stay equal
        self.mask.accumulate(self.trainer.strategy.reduce(found.weights[0], reduce_op="mean"))
        if self.apply_meta_gradient(main, found, {}, len(views[0])):
            self.mask.confine()

    def meta_problem(
        self,
        views: list[torch.Tensor],
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> BilevelProblem:
        """Eqs. (6) and (7) for one batch: both losses are L_task, w is the mask."""
        task, mask_now = Functional(self.task), self.mask.values().detach()

        def loss_of(views, target_feats):
            if target_feats is None:
                target_feats = self.target_features(views, keep_statistics=True)
            masked_targets = None if target_feats is None else [h * mask_now for h in target_feats]
            return lambda h, phi, weights: task(phi, list(h * weights[0]), masked_targets)

        views, outer_views, outer_targets = self.laid_out(views, outer)
        inner_loss = loss_of(views, target_feats)
        return BilevelProblem(
            inner_loss=inner_loss,
            outer_loss=inner_loss if outer_views is None else loss_of(outer_views, outer_targets),
            head_params=task.params,
            weights=(mask_now,),
            **self.encoder_problem(Functional(self.backbone), views, encoded, outer_views),
        )
