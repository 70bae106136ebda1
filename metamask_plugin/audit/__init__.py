"""Audits an encoder for dimensional confounders: which feature dimensions hurt a classifier.

It works on arrays of features and labels, whatever made them, and needs none of the training code:

    from metamask_plugin.audit import audit

    result = audit(features, labels)
    print(result.summary())
"""

from metamask_plugin.audit.confounders import audit
from metamask_plugin.audit.masks import below_average, masked_correct, random_masks
from metamask_plugin.audit.result import AuditResult

__all__ = ["AuditResult", "audit", "below_average", "masked_correct", "random_masks"]
