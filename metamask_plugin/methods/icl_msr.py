"""ICL-MSR: contrastive learning whose positives are adjusted for what the background explains."""

from collections.abc import Iterable
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.bilevel import BilevelProblem, EncoderPass, Functional, MetaGradient, current_ranks
from metamask_plugin.errors import check, choose
from metamask_plugin.losses import uniformity_loss
from metamask_plugin.losses.uniformity import SCOPES
from metamask_plugin.methods.base import TaskMethod, original_pipeline
from metamask_plugin.methods.interventional import LEVELS, InterventionalTask
from metamask_plugin.methods.meta_checks import DEFAULTS
from metamask_plugin.methods.meta_step import MetaStep, MetaVariables, OuterBatch
from metamask_plugin.methods.presets import apply_preset
from metamask_plugin.methods.step import RegularLoss
from metamask_plugin.modules.encoder_split import EncoderSplit
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.modules.semantic_regularizer import SemanticRegularizer, weight_statistics

PAPER: dict[str, Any] = {
    "task": "simclr",
    # "head 1024" is the hidden width and "64" its output, as in the W-MSE code base that it follows
    "task_kwargs": {"proj_hidden_dim": 1024, "proj_output_dim": 64, "temperature": 0.5},
    "lamb": 1.0,  # SimCLR + MSR, Section 6.3; docs/method.md has the other tasks'
    "gamma": 1.0,
    "level": "features",
    "uniformity": {"t": 2.0, "scope": "image"},
    "regularizer": {
        "n": 6,
        "name": "conv4",
        "kwargs": {"width": 16, "norm": "group"},
        "activation": "sigmoid",
    },
    "meta": {
        **DEFAULTS,
        "when": "epoch_end",  # Algorithm 1: all regular steps, then all meta steps
        # beta is not in the paper
        "optimizer": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "kwargs": {}},
    },
}

PRESETS = {"paper": PAPER}


class ICLMSR(TaskMethod):
    """ICL-MSR on top of any contrastive task. Algorithm 1 of [0].

    Regular step, f_msr fixed, over encoder and head (Eq. 5), with A = f_msr(un-augmented image):

        L_to = L_ct + lamb * L_msr(A)

    Meta step over f_msr, for all batches after the epoch's last regular step (Eqs. 7, 8):

        L_ct(f', f_ph') + gamma * L_uni(A)   through the adapted parameters   f' = f - l grad L_to

    f_msr plays no part at test time.

    A batch's last view is the un-augmented image: the last pipeline of ``augmentations`` must draw
    nothing, make one crop, and have a ``crop_size`` of its own, by which solo-learn's loader, too, tells
    it from the augmented views. The backbone never sees it.

    Args:
        cfg: the host's configuration; its ``method_kwargs`` are

            - ``preset``: ``paper``, what the rest defaults to;
            - ``task``, ``task_kwargs``: what fills L_ct, and its settings;
            - ``lamb``: lambda of Eq. (5), >= 0;
            - ``gamma``: of Eq. (8), >= 0;
            - ``level``: where A enters, see
              :class:`~metamask_plugin.methods.interventional.InterventionalTask`;
            - ``uniformity``: ``t`` and ``scope`` of Eq. (9), see
              :func:`~metamask_plugin.losses.uniformity_loss`;
            - ``regularizer``: f_msr: ``n``, ``activation``, and ``name`` and ``kwargs`` of its trunk, one of
              our encoders or any timm model;
            - ``meta``: see :class:`~metamask_plugin.methods.meta_step.MetaStep`, and ``enabled``
              (``False``: f_msr stays as it was initialised).

    Raises:
        UserError: for settings that cannot be, or without the un-augmented view.

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16))
        >>> encoder.num_features = 16
        >>> heads = {"proj_hidden_dim": 32, "proj_output_dim": 8}
        >>> method = ICLMSR(encoder, image_size=16, num_classes=10, task_kwargs=heads, original_size=20)
        >>> method.regularizer(torch.ones(4, 3, 20, 20)).shape
        torch.Size([4, 6, 16])
    """

    def __init__(self, cfg: DictConfig | nn.Module, **settings: Any):
        super().__init__(cfg, **settings)
        kwargs = self.cfg.method_kwargs
        self.split = None
        if kwargs.level == "feature_map":
            check(
                self.task.target is None,
                "method_kwargs.level",
                "features or projection with a task that has a target network",
                kwargs.level,
            )
            self.split = EncoderSplit(
                self.backbone, OmegaConf.select(self.cfg, "augmentations[0].crop_size", default=32)
            )
        check(
            self.split is None or kwargs.meta.when != "before_step",
            "method_kwargs.level",
            "features or projection with meta.when=before_step, whose pass is recorded up to the features",
            kwargs.level,
        )
        check(
            self.split is None or not self.multicrop,
            "method_kwargs.level",
            "features or projection with small crops, whose feature maps have another size",
            kwargs.level,
        )
        # built last: encoder and head start as they would without it, under the same seed
        self.regularizer = self._build_regularizer() if needs_regularizer(kwargs) else None
        if kwargs.meta.enabled:
            self.meta = MetaStep(kwargs.meta, self._encoder(), self._interventional_task())

    def _build_regularizer(self) -> SemanticRegularizer:
        kwargs = self.cfg.method_kwargs
        channels = {
            "features": self.features_dim,
            "feature_map": self.split.channels if self.split else None,
            "projection": self.task.projection_dim,
        }[kwargs.level]
        settings = kwargs.regularizer
        options = OmegaConf.to_container(settings.kwargs)
        size = self.original.crop_size
        trunk = build_encoder(settings.name, size, setting="method_kwargs.regularizer", **options)
        return SemanticRegularizer(trunk, channels, settings.n, settings.activation)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Adds the host's defaults and the preset's, and checks ``method_kwargs`` and the views."""
        cfg = super(ICLMSR, ICLMSR).add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs = kwargs = apply_preset(PRESETS, cfg.method_kwargs)
        check(kwargs.lamb >= 0, "method_kwargs.lamb", ">= 0", kwargs.lamb)
        check(kwargs.gamma >= 0, "method_kwargs.gamma", ">= 0", kwargs.gamma)
        check(kwargs.uniformity.t > 0, "method_kwargs.uniformity.t", "> 0", kwargs.uniformity.t)
        choose("method_kwargs.uniformity.scope", kwargs.uniformity.scope, SCOPES)
        choose("method_kwargs.level", kwargs.level, LEVELS)
        check(
            original_pipeline(cfg) is not None or not needs_regularizer(kwargs),
            "augmentations",
            "a list whose last block makes f_msr's un-augmented view (num_crops 1, nothing random, a "
            "crop_size that no other block has)",
            "none such",
            "append '- {crop_size: 36, num_crops: 1}', for solo-learn's own loader with every key, as in "
            "scripts/pretrain/cifar/augmentations/with_original.yaml",
        )
        return cfg

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds the feature ``maps`` for ``level: feature_map``."""
        if self.split is None:
            return super().forward(X)
        maps = self.split.front(X.to(memory_format=self.memory_format))
        feats = self.split.tail(maps)
        out = {"logits": self.classifier(feats.detach()), "feats": feats, "maps": maps}
        if not self.training:
            out["z"] = self.task.project(out["feats"])
        return out

    def regular_loss(
        self,
        out: dict[str, list[torch.Tensor]],
        target_feats: list[torch.Tensor] | None,
        original: torch.Tensor | None = None,
    ) -> RegularLoss:
        """Eq. (5) for one batch."""
        lamb = self.cfg.method_kwargs.lamb
        weights = None
        if lamb > 0:
            with torch.no_grad():  # f_msr is fixed here, down to the statistics a trunk may keep
                weights = self._strata_of_all(Functional(self.regularizer)({}, original))
        encoded = out["feats" if self.split is None else "maps"]
        contrast, adjusted = self._interventional_task()(encoded, weights, target_feats, out["feats"])
        loss, parts = contrast.loss, {"train_task_loss": contrast.loss}
        if adjusted is not None:
            loss, parts["train_msr_loss"] = loss + lamb * adjusted, adjusted
        return RegularLoss(loss, parts, contrast.projections, contrast.targets)

    def meta_problem(
        self,
        views: list[torch.Tensor],
        outer_param: torch.Tensor,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> BilevelProblem:
        """Eqs. (7) and (8) for one batch: w is A, (N, n, C), from which the gradient goes on into f_msr."""
        if target_feats is None:
            target_feats = self.target_features(views, keep_statistics=True)
        outer_views, outer_targets = (None, target_feats) if outer is None else outer
        if outer_views is not None and outer_targets is None:
            outer_targets = self.target_features(outer_views, keep_statistics=True)
        lamb, gamma = self.cfg.method_kwargs.lamb, self.cfg.method_kwargs.gamma
        encoder_names = head_names = None
        if self.split is not None:  # what lies behind the map is the head's here
            encoder_names = self.split.front_names
            head_names = {f"tail.{name}" for name in self.split.tail_names}
            head_names |= {f"task.{name}" for name, _ in self.task.named_parameters()}
        head = Functional(self._interventional_task(), head_names)

        def inner_loss(encoded, phi, w):
            """Eq. (5), L_to = L_ct + lambda L_msr(A), which the inner step of Eq. (7) descends."""
            contrast, adjusted = head(phi, list(encoded), w[0] if lamb > 0 else None, target_feats)
            return contrast.loss if adjusted is None else contrast.loss + lamb * adjusted

        def outer_loss(encoded, phi, w):
            """Eq. (8): L_ct at the adapted parameters, and gamma L_uni(A)."""
            contrast, _ = head(phi, list(encoded), None, outer_targets)
            return contrast.loss + gamma * self._uniformity(w[0])

        return BilevelProblem.on_views(
            Functional(self._encoder(), encoder_names),
            views,
            outer_views,
            self.meta and self.meta.dtype,
            inner_loss=inner_loss,
            outer_loss=outer_loss,
            head_params=head.params,
            outer_params=(outer_param,),
            encoded=encoded,
            ranks=self.ranks,
        )

    def meta_variables(self, original: torch.Tensor) -> MetaVariables:
        """w is A of the global batch; dL/dA goes through A into f_msr by one back-propagation."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.regularizer.named_parameters()}
        own = torch.func.functional_call(self.regularizer, leaves, (original,))
        self._latest_weights = weights = self._strata_of_all(own)

        def accumulate(found: MetaGradient) -> dict[str, torch.Tensor]:
            ranks, (gradient,) = current_ranks(), found.outer_params
            part = gradient if ranks is None else ranks.local_slice(gradient)
            pulled = torch.autograd.grad(own, list(leaves.values()), part, materialize_grads=True)
            grads = dict(zip(leaves, pulled))
            grads = grads if ranks is None else ranks.sum(grads)
            for name, parameter in self.regularizer.named_parameters():
                parameter.grad = grads[name]
            return self._terms(weights, found)

        return MetaVariables(weights, accumulate)

    def meta_parameters(self) -> Iterable[nn.Parameter]:
        return self.regularizer.parameters()

    def meta_state(self) -> dict[str, torch.Tensor]:
        weights = getattr(self, "_latest_weights", None)
        return {} if weights is None else weight_statistics(weights)

    def _strata_of_all(self, own: torch.Tensor) -> torch.Tensor:
        """A of the global batch, (N, n, C), without a graph."""
        ranks = current_ranks()
        return own.detach() if ranks is None else ranks.gather(own)

    def _terms(self, weights: torch.Tensor, found: MetaGradient) -> dict[str, torch.Tensor]:
        """Both terms of Eq. (8), and how hard each pulls at A."""
        leaf = weights.clone().requires_grad_()
        uniformity = self._uniformity(leaf)
        gamma = self.cfg.method_kwargs.gamma
        (pull,) = torch.autograd.grad(gamma * uniformity, leaf)
        return {
            "train_outer_loss": found.outer_loss - gamma * uniformity.detach(),
            "train_uniformity_loss": uniformity.detach(),
            "meta_gradient_task": (found.outer_params[0] - pull).norm(),
            "meta_gradient_uniformity": pull.norm(),
        }

    def _uniformity(self, weights: torch.Tensor) -> torch.Tensor:
        settings = self.cfg.method_kwargs.uniformity
        return uniformity_loss(weights, settings.t, settings.scope)

    def _encoder(self) -> nn.Module:
        """What A follows: the backbone, or its part before the feature map is pooled."""
        return self.backbone if self.split is None else self.split.front

    def _interventional_task(self) -> InterventionalTask:
        """Made anew where it is needed: as an attribute it would list the task's weights twice."""
        tail = None if self.split is None else self.split.tail
        return InterventionalTask(self.task, self.cfg.method_kwargs.level, tail)


def needs_regularizer(kwargs: DictConfig) -> bool:
    """Whether f_msr has anything to do: without lambda and without a meta step this is the plain task."""
    return kwargs.lamb > 0 or kwargs.meta.enabled
