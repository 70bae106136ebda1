"""The denominators of debiased contrastive learning and of its hard negatives."""

import math

import torch

from metamask_plugin.losses.contrastive import NegativeMass


def debiased_negative_mass(tau_plus: float, temperature: float, beta: float = 0.0) -> NegativeMass:
    """What the K negatives of an anchor would amount to, were none of them of the anchor's own class.

        S  = sum_neg e-                                               beta = 0, DCL [0]
        S  = K sum_neg w e- / sum_neg w,   w = (e-)^beta              beta > 0, HCL [1]
        Ng = max( (S - K tau+ e+) / (1 - tau+),  K exp(-1 / tau) )
        loss of an anchor   -log e+ / (e+ + Ng)

    with e = exp(cosine / tau). The positive stands for the negatives that share the anchor's class (the
    estimator of [0] with M = 1). The second term of the maximum is the least that K negatives can sum to;
    where it is the larger one, Ng is constant and no gradient reaches the negatives.

    Hard negatives [1] weigh more by the product in the loss's own exponent: beta multiplies cosine / tau.
    So the released code has it, and [1] writes w = exp(beta f(x) . f(x-)) where the loss has
    exp(f(x) . f(x-)).

    With tau+ = 0 and beta = 0 it is the plain sum. Of several strata of the positive [2], each has an Ng of
    its own. Excluded candidates do not count in K.

    Args:
        tau_plus: tau+ in [0, 1), the probability that a random image is of the anchor's class.
        temperature: tau > 0, by which the logits were divided.
        beta: >= 0, how much more a hard negative weighs.

    Returns:
        A function from the positives' logits (N, n) and the candidates' (N, K), -inf where excluded, to
        log Ng, shape (N, n), or (N, 1) for tau+ = 0.

    Raises:
        ValueError: for tau+ outside [0, 1), tau <= 0 or beta < 0.

    Example:
        >>> mass = debiased_negative_mass(tau_plus=0.1, temperature=1.0)
        >>> positives, negatives = torch.tensor([[2.0]]).log(), torch.zeros(1, 3)  # e+ = 2, e- = 1
        >>> round(mass(positives, negatives).exp().item(), 3)  # (3 - 3 * 0.1 * 2) / (1 - 0.1)
        2.667

    [0] Chuang et al., *Debiased Contrastive Learning*, NeurIPS 2020.
    [1] Robinson et al., *Contrastive Learning with Hard Negative Samples*, ICLR 2021.
    [2] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    for name, value, fits, expected in (
        ("tau_plus", tau_plus, 0 <= tau_plus < 1, "in [0, 1)"),
        ("temperature", temperature, temperature > 0, "> 0"),
        ("beta", beta, beta >= 0, ">= 0"),
    ):
        if not fits:
            raise ValueError(f"debiased_negative_mass: {name} must be {expected}, got {value}")

    def mass(positives: torch.Tensor, negatives: torch.Tensor) -> torch.Tensor:
        # half precision has too few digits for the difference, and ends below a large K
        dtype = torch.promote_types(negatives.dtype, torch.float32)
        positives, negatives = positives.to(dtype), negatives.to(dtype)
        log_count = (~negatives.isneginf()).sum(dim=1, keepdim=True).to(dtype).log()

        log_sum = negatives.logsumexp(dim=1, keepdim=True)
        if beta > 0:
            log_weights = (beta * negatives).logsumexp(dim=1, keepdim=True)
            log_sum = log_count + ((1 + beta) * negatives).logsumexp(dim=1, keepdim=True) - log_weights
        if tau_plus == 0:
            return log_sum

        def corrected(log_share: torch.Tensor) -> torch.Tensor:
            return log_sum + (-log_share.expm1()).log() - math.log1p(-tau_plus)

        log_share = positives + log_count + math.log(tau_plus) - log_sum  # what is subtracted, as part of S
        floor = log_count - 1 / temperature
        above = corrected(log_share) > floor  # also false for the NaN of a negative difference
        # the branch that is not taken gets a harmless number: where its exponential overflows, zero times
        # infinity would pass into the gradient
        return torch.where(above, corrected(log_share.masked_fill(~above, -1.0)), floor)

    return mass
