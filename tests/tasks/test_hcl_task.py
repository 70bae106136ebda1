"""HCL where it differs from DCL; test_dcl_task.py has what they share."""

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.tasks.dcl import DCL
from metamask_plugin.tasks.hcl import HCL

SMALL = {"proj_hidden_dim": 12, "proj_output_dim": 5}


@pytest.fixture
def views():
    torch.manual_seed(0)
    return [torch.randn(6, 5) for _ in range(2)]


def test_without_beta_it_is_dcl(views):
    assert torch.equal(HCL(8, **SMALL, beta=0).loss(views), DCL(8, **SMALL).loss(views))


def test_the_harder_the_negatives_count_the_larger_the_loss(views):
    losses = [HCL(8, **SMALL, beta=beta).loss(views) for beta in (0.0, 0.5, 1.0, 2.0)]
    assert all(easier < harder for easier, harder in zip(losses, losses[1:]))
    assert torch.equal(HCL(8, **SMALL).loss(views), losses[2])  # the default


def test_weighted_positives_leave_the_weights_of_negatives_alone(views):
    task = HCL(8, **SMALL)
    once = task.loss(views, None, [view[:, None] for view in views])
    longer = task.loss(views, None, [7 * view[:, None] for view in views])
    torch.testing.assert_close(longer, once)


def test_wrong_beta():
    with pytest.raises(UserError, match="method_kwargs.task_kwargs.beta must be >= 0, got -1"):
        HCL(8, beta=-1)
