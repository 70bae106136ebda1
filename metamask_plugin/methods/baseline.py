"""A task alone: the row of a table that MetaMask or ICL-MSR is then added to."""

from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.errors import check, choose
from metamask_plugin.methods import icl_msr, metamask
from metamask_plugin.methods.base import TaskMethod
from metamask_plugin.methods.presets import apply_preset
from metamask_plugin.methods.step import RegularLoss
from metamask_plugin.modules.feature_dropout import FeatureDropout

DEFAULTS: dict[str, Any] = {
    "task": "simclr",
    "task_kwargs": {},
    "alpha": 1.0,
    "scale_loss": 1.0,
    "feature_dropout": {"rate": 0.0, "shared": False},
}

PLUGINS = {"preset", *metamask.PAPER, *icl_msr.PAPER}
"""What a config of MetaMask or ICL-MSR says besides; it has no meaning here."""


class Baseline(TaskMethod):
    """A self-supervised task and nothing else: scale_loss * alpha * L_task.

    ``method=baseline`` turns a config of either method into its baseline: the same task, encoder, views and
    budget; what belongs to the method is left aside.

    Args:
        cfg: the host's configuration; its ``method_kwargs`` are

            - ``task``, ``task_kwargs``: what is trained, and its settings;
            - ``alpha``, ``scale_loss``: factors on the loss, as in MetaMask's Eq. (5), so that with plain SGD
              the task's steps are as long as there;
            - ``feature_dropout``: ``rate`` and ``shared``, dropout on the encoder's output (Table 5 of [0]).

    Raises:
        UserError: for settings that cannot be.

    [0] Li et al., *MetaMask*, NeurIPS 2022.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16))
        >>> encoder.num_features = 16
        >>> heads = {"proj_hidden_dim": 32, "proj_output_dim": 8}
        >>> method = Baseline(encoder, image_size=16, num_classes=10, task_kwargs=heads)
        >>> method.eval()(torch.ones(4, 3, 16, 16))["z"].shape
        torch.Size([4, 8])
    """

    def __init__(self, cfg: DictConfig | nn.Module, **settings: Any):
        super().__init__(cfg, **settings)
        self.feature_dropout = FeatureDropout(**self.cfg.method_kwargs.feature_dropout)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Adds the host's defaults and this method's, and checks ``method_kwargs``."""
        cfg = super(Baseline, Baseline).add_and_assert_specific_cfg(cfg)
        for key in cfg.method_kwargs:
            choose("a key of method_kwargs", key, {*DEFAULTS, *PLUGINS})
        own = OmegaConf.masked_copy(cfg.method_kwargs, [key for key in cfg.method_kwargs if key in DEFAULTS])
        cfg.method_kwargs = kwargs = apply_preset({"paper": DEFAULTS}, own)
        check(kwargs.alpha > 0, "method_kwargs.alpha", "> 0", kwargs.alpha)
        check(kwargs.scale_loss > 0, "method_kwargs.scale_loss", "> 0", kwargs.scale_loss)
        return cfg

    def regular_loss(
        self,
        out: dict[str, list[torch.Tensor]],
        target_feats: list[torch.Tensor] | None,
        original: torch.Tensor | None = None,
    ) -> RegularLoss:
        """The task's loss and its factors."""
        task = self.task(self.feature_dropout(out["feats"]), target_feats)
        kwargs = self.cfg.method_kwargs
        loss = kwargs.scale_loss * kwargs.alpha * task.loss
        return RegularLoss(loss, {"train_task_loss": task.loss}, task.projections, task.targets)
