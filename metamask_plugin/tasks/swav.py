"""SwAV: predict from one view which prototypes another view was assigned to."""

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from metamask_plugin.errors import check
from metamask_plugin.losses.sinkhorn import sinkhorn_codes
from metamask_plugin.losses.swav import multi_crop_loss
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import Positives, Projections, Task


class Prototypes(nn.Linear):
    """K trainable directions; projections go to their cosines with them.

    Args:
        dim: P.
        number: K.

    Example:
        >>> prototypes = Prototypes(4, 3)
        >>> scores = prototypes(2 * prototypes.weight)
        >>> scores.diagonal().allclose(torch.ones(3))  # each is at cosine 1 to itself
        True
    """

    def __init__(self, dim: int, number: int):
        super().__init__(dim, number, bias=False)
        self.normalise()

    def forward(self, z: torch.Tensor, frozen: bool = False) -> torch.Tensor:
        """Cosines, (..., P) to (..., K); frozen, they pass a gradient of zero on to the prototypes."""
        # zero, not none: DDP wants a gradient for every parameter
        weight = self.weight.detach() + 0 * self.weight if frozen else self.weight
        return F.normalize(z, dim=-1) @ F.normalize(weight, dim=1).T

    @torch.no_grad()
    def normalise(self) -> None:
        """To unit length, in place; no cosine changes."""
        self.weight.copy_(F.normalize(self.weight, dim=1))


class SwAV(Task):
    """Swapped prediction of online codes, Eqs. (1) to (6) of [0].

    Codes come from the large crops, predictions from all views. Prototypes are normalised where they are
    compared, so that a trial step stays on the sphere, and in place once an optimiser step. Nothing is
    differentiated through Sinkhorn-Knopp, neither once nor twice: on that the exact and the unrolled
    meta-gradient agree; a finite difference does not, since codes follow the displaced weights.

    ICL-MSR's form predicts an unweighted view's code from the other views' strata.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the head's hidden layer.
        proj_output_dim: P.
        num_prototypes: K; to use them all alike takes about as many images, those of the queue included.
        temperature: tau of the predictions.
        epsilon: sharpness of the codes; 0.03 if they collapse (the authors' README).
        sinkhorn_iterations: for the codes.
        queue_size: past projections, for either of the first two large crops, with which codes are computed;
            [0] takes 3,840 for batches of 256, none for 4,096. Further large crops share these two queues.
        queue_start: optimiser steps before the queue is used, which it never is until it is full. [0] waits
            for 15 epochs, since projections go out of date quickly at first.
        freeze_prototypes_steps: optimiser steps during which the prototypes get a gradient of zero, and only
            weight decay touches their length; [0] freezes them for one epoch.

    [0] Caron et al., *Unsupervised Learning of Visual Features by Contrasting Cluster Assignments*,
        NeurIPS 2020.

    Example:
        >>> task = SwAV(8, proj_hidden_dim=16, proj_output_dim=4, num_prototypes=5, queue_size=0)
        >>> out = task([torch.randn(6, 8), torch.randn(6, 8)])
        >>> out.loss.shape, out.projections[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Caron et al., NeurIPS 2020"
    negatives = "none (equal use of the prototypes)"
    capturable = False  # prototypes are frozen, and queues used, from some step on
    queued: torch.Tensor
    steps: torch.Tensor

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 2048,
        proj_output_dim: int = 128,
        num_prototypes: int = 3000,
        temperature: float = 0.1,
        epsilon: float = 0.05,
        sinkhorn_iterations: int = 3,
        queue_size: int = 3840,
        queue_start: int = 0,
        freeze_prototypes_steps: int = 0,
    ):
        super().__init__(features_dim)
        name = "method_kwargs.task_kwargs"
        check(temperature > 0, f"{name}.temperature", "> 0", temperature)
        check(epsilon > 0, f"{name}.epsilon", "> 0", epsilon)
        for setting, least, value in (
            ("num_prototypes", 2, num_prototypes),
            ("sinkhorn_iterations", 1, sinkhorn_iterations),
            ("queue_start", 0, queue_start),
            ("freeze_prototypes_steps", 0, freeze_prototypes_steps),
        ):
            check(value >= least, f"{name}.{setting}", f">= {least}", value)
        self.temperature, self.epsilon, self.sinkhorn_iterations = temperature, epsilon, sinkhorn_iterations
        self.queue_size, self.queue_start = queue_size, queue_start
        self.freeze_prototypes_steps = freeze_prototypes_steps
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)
        self.prototypes = Prototypes(proj_output_dim, num_prototypes)
        queues = (FeatureQueue(queue_size, proj_output_dim, f"{name}.queue_size") for _ in range(2))
        self.queues = cast("Sequence[FeatureQueue]", nn.ModuleList(queues))
        self.register_buffer("queued", torch.zeros((), dtype=torch.long))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self._counts: dict[str, int] | None = None
        self.register_load_state_dict_post_hook(_forget_counts)

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        scores = self._scores(projections)
        predicting = scores if positives is None else self._scores(positives)
        return multi_crop_loss(self._codes(scores), predicting, self.temperature)

    def _scores(self, projections: Positives) -> list[torch.Tensor]:
        frozen = self._counted()["steps"] < self.freeze_prototypes_steps
        return [self.prototypes(z, frozen) for z in projections]

    @torch.no_grad()
    def _codes(self, scores: list[torch.Tensor]) -> list[torch.Tensor]:
        """Codes of the large crops, (N, K) each."""
        past: Sequence[torch.Tensor | None] = (None, None)
        counts = self._counted()
        if 0 < self.queue_size <= counts["queued"] and counts["steps"] >= self.queue_start:
            past = self._scores([queue.entries for queue in self.queues])
        return [
            sinkhorn_codes(view, self.epsilon, self.sinkhorn_iterations, past[crop % 2])
            for crop, view in enumerate(scores[: self.large_views])
        ]

    def _counted(self) -> dict[str, int]:
        """``queued`` and ``steps`` on the host, so that no step waits for the device to tell them."""
        if self._counts is None:
            self._counts = {"queued": int(self.queued), "steps": int(self.steps)}
        return self._counts

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        for queue, view in zip(self.queues, projections[: self.large_views]):
            queue.push(view)
        counts, count = self._counted(), len(projections[0])
        counts["queued"] = min(counts["queued"] + count, self.queue_size)
        self.queued.fill_(counts["queued"])

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, progress: float) -> None:
        self.prototypes.normalise()
        counts = self._counted()
        counts["steps"] += 1
        self.steps.fill_(counts["steps"])


def _forget_counts(task: SwAV, incompatible_keys: object) -> None:
    task._counts = None
