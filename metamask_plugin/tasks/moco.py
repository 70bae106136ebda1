"""MoCo v2: queries against the target network's keys, and a queue of past keys."""

import torch

from metamask_plugin.errors import check
from metamask_plugin.losses.moco import moco_loss
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import MomentumTask, Projections


class MoCo(MomentumTask):
    """Momentum Contrast [0], Eqs. (1) and (2), with the head and the temperature of version 2 [1].

    The query of a view has to be told its key, another view through the target network, among past keys.

    What differs from [1]: each large crop gives both queries and keys, and the loss is averaged over both
    directions, where [1] takes one; the head has BatchNorm behind its hidden layer; and there is no
    shuffling of BatchNorm's batches among devices, so that queries and keys of a batch share statistics.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer; [1] has that of a ResNet-50's output, 2,048.
        proj_output_dim: P, the dimension of queries and keys.
        temperature: tau; 0.2 in [1], 0.07 in [0].
        queue_size: K past keys, all negatives there are; ICL-MSR's Table 2 takes 4,096.
        base_momentum: of the target network at the start of training.
        final_momentum: at its end; [0] keeps it at 0.999 throughout.

    [0] He et al., *Momentum Contrast for Unsupervised Visual Representation Learning*, CVPR 2020.
    [1] Chen et al., *Improved Baselines with Momentum Contrastive Learning*, 2020.

    Example:
        >>> task = MoCo(8, proj_hidden_dim=16, proj_output_dim=4, queue_size=32)
        >>> encoder, views = torch.nn.Linear(12, 8), [torch.randn(6, 12), torch.randn(6, 12)]
        >>> task.init_target(encoder)
        >>> out = task([encoder(x) for x in views], [task.target.trunk(x) for x in views])
        >>> out.loss.shape, out.targets[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Chen et al., arXiv 2020"
    negatives = "a queue of past keys"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 128,
        temperature: float = 0.2,
        queue_size: int = 65536,
        base_momentum: float = 0.999,
        final_momentum: float = 0.999,
    ):
        super().__init__(features_dim, base_momentum, final_momentum)
        name = "method_kwargs.task_kwargs"
        check(temperature > 0, f"{name}.temperature", "> 0", temperature)
        whole = isinstance(queue_size, int) and queue_size >= 1
        check(whole, f"{name}.queue_size", "an integer >= 1", queue_size)
        self.temperature = temperature
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)
        self.queue = FeatureQueue(queue_size, proj_output_dim, f"{name}.queue_size", negatives=True)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        positives = targets if positives is None else positives
        return moco_loss(projections, positives, self.queue.entries, self.temperature)

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        assert targets is not None
        self.queue.push(torch.cat(list(targets)))
