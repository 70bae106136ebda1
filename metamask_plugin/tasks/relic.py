"""RELIC: tell images apart, equally well whatever the augmentations."""

import torch
from torch import nn

from metamask_plugin.errors import check
from metamask_plugin.losses.relic import relic_loss
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.modules.heads import projection_head
from metamask_plugin.tasks.base import MomentumTask, Projections


class RELIC(MomentumTask):
    """Eq. (3) of [0]: InfoNCE against a target network, and a divergence between its likelihoods.

    With a target network [0] takes BYOL's architecture [1] (Appendix E.2): a projection head, a predictor
    behind the online one, targets without predictor. Eq. (3) writes one critic for both branches, which
    is what ``pred_hidden_dim=0`` leaves. Negatives of an anchor are the other images' targets of the
    positive's view.

    L_msr averages the likelihood of the weighted target over the strata, inside the logarithm; negatives
    and divergence are those of the loss, unweighted.

    Args:
        features_dim: D, the encoder's output.
        proj_hidden_dim: width of the projection head's hidden layer.
        proj_output_dim: P, the projection's dimension.
        pred_hidden_dim: width of the predictor's hidden layer; None: proj_hidden_dim, as in [1]; 0: no
            predictor.
        temperature: tau. Chosen here: [0] gives it for Atari only, 1.
        alpha: weight of the divergence. Chosen here: [0] does not give it.
        base_momentum: of the target network at the start; [0] and [1] at 1,000 epochs take 0.996.
        final_momentum: of the target network at the end.
        bank_size: K past targets as further candidates in all likelihoods; [0] has none.

    [0] Mitrovic et al., *Representation Learning via Invariant Causal Mechanisms*, ICLR 2021.
    [1] Grill et al., *Bootstrap Your Own Latent*, NeurIPS 2020.

    Example:
        >>> task = RELIC(8, proj_hidden_dim=16, proj_output_dim=4)
        >>> encoder, views = torch.nn.Linear(12, 8), [torch.randn(6, 12), torch.randn(6, 12)]
        >>> task.init_target(encoder)
        >>> out = task([encoder(x) for x in views], [task.target.trunk(x) for x in views])
        >>> out.loss.shape, out.targets[0].shape
        (torch.Size([]), torch.Size([6, 4]))
    """

    source = "Mitrovic et al., ICLR 2021"
    negatives = "the batch's targets, memory bank optional"

    def __init__(
        self,
        features_dim: int,
        proj_hidden_dim: int = 4096,
        proj_output_dim: int = 256,
        pred_hidden_dim: int | None = None,
        temperature: float = 0.2,
        alpha: float = 1.0,
        base_momentum: float = 0.996,
        final_momentum: float = 1.0,
        bank_size: int = 0,
    ):
        super().__init__(features_dim, base_momentum, final_momentum)
        name = "method_kwargs.task_kwargs"
        pred_hidden_dim = proj_hidden_dim if pred_hidden_dim is None else pred_hidden_dim
        check(pred_hidden_dim >= 0, f"{name}.pred_hidden_dim", ">= 0", pred_hidden_dim)
        check(temperature > 0, f"{name}.temperature", "> 0", temperature)
        check(alpha >= 0, f"{name}.alpha", ">= 0", alpha)
        self.temperature, self.alpha = temperature, alpha
        self.projection_dim = proj_output_dim
        self.projector = projection_head(features_dim, proj_hidden_dim, proj_output_dim)
        self.predictor = (
            projection_head(proj_output_dim, pred_hidden_dim, proj_output_dim)
            if pred_hidden_dim
            else nn.Identity()
        )
        self.bank = FeatureQueue(bank_size, proj_output_dim, negatives=True)

    def project(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        return self.predictor(self.projector(feats))

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        bank = self.bank.entries
        return relic_loss(projections, targets, self.temperature, self.alpha, bank, positives)

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        assert targets is not None
        self.bank.push(torch.cat(list(targets)))
