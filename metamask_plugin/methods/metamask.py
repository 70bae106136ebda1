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
from metamask_plugin.methods.base import TaskMethod
from metamask_plugin.methods.meta_checks import DEFAULTS
from metamask_plugin.methods.meta_step import MetaStep, MetaVariables, OuterBatch
from metamask_plugin.methods.presets import apply_preset
from metamask_plugin.methods.step import RegularLoss
from metamask_plugin.modules.dimensional_mask import DimensionalMask
from metamask_plugin.modules.heads import projection_head

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


class MetaMask(TaskMethod):
    """MetaMask on top of any task. Algorithm 1 of [0].

    Regular step, M fixed, over encoder and heads (Eq. 5):

        scale_loss * ( weight * L_drr(g_drr(h * M)) + alpha * L_task(g_task(h * M)) )

    Meta step, on the same batch right after the optimiser's step, over M (Eqs. 6, 7):

        L_task(g_task'(h' * M))   through the adapted parameters   theta' = theta - l grad L_task

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
            - ``meta``: see :class:`~metamask_plugin.methods.meta_step.MetaStep`, and ``enabled``
              (``False`` is "without meta-learning", Fig. 10: M stays 1).

    Raises:
        UserError: for settings that cannot be.

    [0] Li et al., *MetaMask: Revisiting Dimensional Confounder for Self-Supervised Learning*, NeurIPS 2022.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16))
        >>> encoder.num_features = 16
        >>> heads = {"proj_hidden_dim": 32, "proj_output_dim": 8}
        >>> method = MetaMask(encoder, image_size=16, num_classes=10, task_kwargs=heads, redundancy=heads)
        >>> method.mask.values().shape
        torch.Size([16])
    """

    def __init__(self, cfg: DictConfig | nn.Module, **settings: Any):
        super().__init__(cfg, **settings)
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
        if kwargs.meta.enabled:
            weight = kwargs.scale_loss * kwargs.alpha
            self.meta = MetaStep(kwargs.meta, self.backbone, self.task, weight)

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

    def masked(self, feats: torch.Tensor) -> torch.Tensor:
        """Eq. (4): h~ = h * M."""
        return self.mask(feats)

    def regular_loss(
        self,
        out: dict[str, list[torch.Tensor]],
        target_feats: list[torch.Tensor] | None,
        original: torch.Tensor | None = None,
    ) -> RegularLoss:
        """Eq. (5) for one batch, times ``scale_loss``.

        The target branch sees masked features as well, under its stop-gradient.
        """
        masked = [self.mask(h) for h in out["feats"]]  # Eq. (4)
        task = self.task(masked, None if target_feats is None else [self.mask(h) for h in target_feats])
        parts = {"train_task_loss": task.loss}
        loss = self.cfg.method_kwargs.alpha * task.loss
        if self.redundancy.weight > 0:  # Eq. (2), summed over pairs of views
            z = [self.redundancy_head(h) for h in masked[: self.num_large_crops]]
            parts["train_redundancy_loss"] = redundancy_loss = sum(
                redundancy_reduction_loss(z1, z2, self.redundancy.lamb, self.redundancy.form)
                for z1, z2 in combinations(z, 2)
            )
            loss = loss + self.redundancy.weight * redundancy_loss
        loss = self.cfg.method_kwargs.scale_loss * loss  # Eq. (5)
        return RegularLoss(loss, parts, task.projections, task.targets)

    def meta_problem(
        self,
        views: list[torch.Tensor],
        outer_param: torch.Tensor | None = None,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> BilevelProblem:
        """Eqs. (6) and (7) for one batch: both losses are L_task, and w is M, the mask's own if None."""
        mask = self.mask.values() if outer_param is None else outer_param

        def task_loss(views, target_feats):
            """L_task(g(h * M)) as a function of h, g's parameters phi and w = (M,)."""
            if target_feats is None:
                target_feats = self.target_features(views, keep_statistics=True)
            targets = None if target_feats is None else [h * mask for h in target_feats]
            return lambda h, phi, w: task(phi, list(h * w[0]), targets).loss

        inner_loss = task_loss(views, target_feats)  # Eq. (7): theta' = theta - l grad L_task
        outer_loss = inner_loss if outer is None else task_loss(*outer)  # Eq. (6): L_task at theta', over M
        task = Functional(self.task)
        return BilevelProblem.on_views(
            Functional(self.backbone),
            views,
            None if outer is None else outer[0],
            self.meta and self.meta.dtype,
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            head_params=task.params,
            outer_params=(mask,),
            encoded=encoded,
            ranks=self.ranks,
        )

    def meta_variables(self, original: torch.Tensor | None = None) -> MetaVariables:
        """w is M, and dL/dM goes into the mask's parameter."""
        reduce = self.trainer.strategy.reduce
        return MetaVariables(
            self.mask.values(),
            # ranks agree on the gradient up to rounding; averaged, their masks stay equal
            lambda found: self.mask.accumulate(reduce(found.outer_params[0], reduce_op="mean")),
            self.mask.confine if self.mask.parameterisation == "sigmoid" else None,
        )

    def meta_parameters(self) -> Iterable[nn.Parameter]:
        return self.mask.parameters()

    def meta_state(self) -> dict[str, torch.Tensor]:
        return self.mask.statistics()
