"""Cross-entropy of two views' relations to the same other samples: the loss of ReSSL."""

import torch
import torch.nn.functional as F


def relation_loss(
    anchors: torch.Tensor,
    targets: torch.Tensor,
    queue: torch.Tensor,
    online_temperature: float = 0.1,
    target_temperature: float = 0.04,
) -> torch.Tensor:
    """How badly an anchor's relation to the queue predicts its target's. Section 3 of [0].

        p'_i = softmax over k of cos(z'_i, q_k) / tau_target
        p_i  = softmax over k of cos(z_i, q_k) / tau_online
        loss = mean over i of the cross-entropy H(p'_i, p_i) = -sum_k p'_ik log p_ik

    At least the entropy of p', which is reached where both relations are equal. tau_target is the smaller
    one, so that the target is the sharper relation. Gradients go to both sides: a stop-gradient is the
    caller's.

    Args:
        anchors: z, of the online network, shape (N, P), N >= 1. Nothing needs to be normalised.
        targets: z', of the target network, shape (N, P).
        queue: q, the samples that both are related to, shape (K, P), K >= 1; log K is the loss of an anchor
            that is equally near to all of them.
        online_temperature: tau_online > 0.
        target_temperature: tau_target > 0.

    Returns:
        A scalar.

    Raises:
        ValueError: for shapes that do not fit, or a temperature <= 0.

    Example:
        >>> z, queue = torch.ones(2, 4), torch.eye(4)
        >>> round(relation_loss(z, z, queue).item(), 3)  # log 4
        1.386

    [0] Zheng et al., *ReSSL: Relational Self-Supervised Learning with Weak Augmentation*, NeurIPS 2021.
    """
    fits = anchors.dim() == queue.dim() == 2 and anchors.shape == targets.shape
    if not (fits and len(anchors) > 0 and len(queue) > 0 and anchors.shape[1] == queue.shape[1]):
        raise ValueError(
            "relation_loss: anchors and targets must be of one shape (N, P), queue (K, P), none empty, got "
            f"{tuple(anchors.shape)}, {tuple(targets.shape)} and {tuple(queue.shape)}"
        )
    for name, value in (
        ("online_temperature", online_temperature),
        ("target_temperature", target_temperature),
    ):
        if not value > 0:
            raise ValueError(f"relation_loss: {name} must be > 0, got {value}")

    queue = F.normalize(queue, dim=1)
    wanted = F.softmax(F.normalize(targets, dim=1) @ queue.T / target_temperature, dim=1)
    log_relation = F.log_softmax(F.normalize(anchors, dim=1) @ queue.T / online_temperature, dim=1)
    return -(wanted * log_relation).sum(dim=1).mean()
