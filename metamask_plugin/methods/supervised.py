"""Supervised training of the encoder: the row that self-supervised encoders are compared with."""

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import nn

from metamask_plugin.bilevel import current_ranks
from metamask_plugin.host.solo_task import HostTask
from metamask_plugin.methods.baseline import Baseline
from metamask_plugin.tasks import Projections, Task

NO_LABEL = -1


class LabelTask(HostTask):
    """Cross-entropy of a linear classifier, mean over the labelled images of all views.

    Args:
        features_dim: D, the encoder's output.
        num_classes: C.
    """

    source = "labels"

    def __init__(self, features_dim: int, num_classes: int):
        super().__init__(features_dim)
        self.projection_dim = num_classes
        self.classifier = nn.Linear(features_dim, num_classes)

    def before_batch(self, indexes: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        ranks = current_ranks()
        self._labels = labels if ranks is None else ranks.gather(labels)

    def project(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        return self.classifier(feats)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        labels = self._labels.repeat(len(projections))
        total = F.cross_entropy(torch.cat(list(projections)), labels, ignore_index=NO_LABEL, reduction="sum")
        return total / (labels != NO_LABEL).sum().clamp(min=1)


class Supervised(Baseline):
    """Trains encoder and classifier on the labels, with a config's encoder, views, optimiser and budget.

    ``method=supervised`` turns a config of either method into the row "Supervised" of MetaMask's Table 6 [0].
    Factors of the self-supervised loss (``alpha``, ``scale_loss``) do not apply to the cross-entropy.

    Args:
        cfg: the host's configuration; see :class:`~metamask_plugin.methods.baseline.Baseline`.

    [0] Li et al., *MetaMask*, NeurIPS 2022, Appendix A.4.6.

    Example:
        >>> encoder = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 16))
        >>> encoder.num_features = 16
        >>> method = Supervised(encoder, image_size=16, num_classes=10)
        >>> method.eval()(torch.ones(4, 3, 16, 16))["z"].shape  # the classifier's logits
        torch.Size([4, 10])
    """

    def _build_task(self) -> Task:
        return LabelTask(self.features_dim, self.num_classes)

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Adds the defaults of :class:`Baseline`, without its factors on the loss."""
        cfg = super(Supervised, Supervised).add_and_assert_specific_cfg(cfg)
        cfg.method_kwargs.alpha = cfg.method_kwargs.scale_loss = 1.0
        return cfg
