"""ReSSL: relate each view to past samples as the target network relates the weakly augmented one."""

from functools import partial

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.pairs import mean_over_pairs
from metamask_plugin.losses.ressl import relation_loss
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import MomentumTask, Projections


class ReSSL(MomentumTask):
    """Cross-entropy of a view's relation to a queue and the weak view's. Section 3 of [0].

        mean over j != k of   H( softmax(z'_k Q^T / tau_target), softmax(z_j Q^T / tau_online) )

    Q, past projections of the target network, unit length like z and z'. The target network sees an image's
    weak view, that is k = 1, the first large crop: list the weak pipeline first in ``augmentations``, as in
    scripts/pretrain/cifar/views/ressl.yaml. All others are anchors. There is no predictor.

    Defaults are the authors' for CIFAR, as others' copies of that code have them; for STL-10 and Tiny
    ImageNet these have a queue of 16,384 and a momentum of 0.996. For ImageNet [1] has 131,072 and 0.999,
    and a head of 4,096 and 512. BatchNorm in the head was chosen here: the one in [1] has none.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        queue_size: K, at least 2: to one sample there is one relation only.
        online_temperature: tau_online.
        target_temperature: tau_target, the smaller, for a sharper target.
        symmetric: every large crop is a target to all other views, in place of the first alone; not in [0].
        base_momentum: m of the target network at the start.
        final_momentum: m at the end, along a cosine; None: base_momentum throughout, as in [1].

    [0] Zheng et al., *ReSSL: Relational Self-Supervised Learning with Weak Augmentation*, NeurIPS 2021.
    [1] https://github.com/KyleZheng1997/ReSSL

    Example:
        >>> task = ReSSL(8, proj_hidden_dim=16, proj_output_dim=4, queue_size=32)
        >>> encoder, views = torch.nn.Linear(12, 8), [torch.randn(6, 12), torch.randn(6, 12)]
        >>> task.init_target(encoder)
        >>> out = task([encoder(x) for x in views], [task.target.trunk(x) for x in views])
        >>> out.loss.shape, out.targets[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Zheng et al., NeurIPS 2021"
    negatives = "none, a queue to relate to"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 512,
        proj_output_dim: int = 128,
        queue_size: int = 4096,
        online_temperature: float = 0.1,
        target_temperature: float = 0.04,
        symmetric: bool = False,
        base_momentum: float = 0.99,
        final_momentum: float | None = None,
    ):
        super().__init__(
            features_dim, base_momentum, base_momentum if final_momentum is None else final_momentum
        )
        name = "method_kwargs.task_kwargs"
        check(
            isinstance(queue_size, int) and queue_size >= 2,
            f"{name}.queue_size",
            "an integer >= 2",
            queue_size,
        )
        check(online_temperature > 0, f"{name}.online_temperature", "> 0", online_temperature)
        check(target_temperature > 0, f"{name}.target_temperature", "> 0", target_temperature)
        self.online_temperature, self.target_temperature = online_temperature, target_temperature
        self.symmetric = symmetric
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)
        self.queue = FeatureQueue(queue_size, proj_output_dim, f"{name}.queue_size")

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        positives = targets if positives is None else positives
        pair_loss = partial(
            relation_loss,
            queue=self.queue.entries,
            online_temperature=self.online_temperature,
            target_temperature=self.target_temperature,
        )
        return mean_over_pairs(pair_loss, projections, positives if self.symmetric else positives[:1])

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        assert targets is not None
        self.queue.push(targets[0])  # one entry an image, also where all large crops are targets
