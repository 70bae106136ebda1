import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.losses.hsic import hsic_loss
from metamask_plugin.tasks.ssl_hsic import SSLHSIC


def started(**settings):
    """A task on 6 features with its target network, and one batch: projections, targets."""
    torch.manual_seed(0)
    task = SSLHSIC(6, **{"proj_hidden_dim": 8, "proj_output_dim": 4, "pred_hidden_dim": 8, **settings})
    task.init_target(nn.Linear(3, 6))
    return task, [torch.randn(5, 4) for _ in range(3)], [torch.randn(5, 4) for _ in range(2)]


@pytest.mark.parametrize("kernel", ["imq", "gaussian"])
def test_is_the_loss_of_all_predictions_and_targets_together(double, kernel):
    task, _, _ = started(gamma=2.0, kernel=kernel, scale=0.5)
    task.eval()
    views = [torch.randn(5, 6) for _ in range(3)]
    targets = [torch.randn(5, 6) for _ in range(2)]
    z = [task.predictor(task.projector(h)) for h in views] + [task.target.head(h) for h in targets]
    torch.testing.assert_close(task(views, targets).loss, hsic_loss(z, 2.0, kernel, 0.5))
    assert task.project(views[0]).shape == (5, task.projection_dim)


def test_the_target_has_no_predictor():
    task, _, _ = started()
    torch.testing.assert_close(task.target.head.state_dict(), task.projector.state_dict())


def test_losses_leave_the_state_alone():
    task, projections, targets = started()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.loss(projections, targets)
    task.loss(projections, targets, [h[:, None] for h in targets])
    task.after_batch(projections, targets)
    torch.testing.assert_close(task.state_dict(), before, rtol=0, atol=0)


def test_adjusted_loss_is_the_mean_over_strata(double):
    task, projections, targets = started()
    unweighted = [h[:, None].expand(-1, 3, -1) for h in targets]
    loss = task.loss(projections, targets)
    torch.testing.assert_close(task.loss(projections, targets, unweighted), loss)
    strata = [torch.randn(5, 3, 4) for _ in range(2)]
    expected = sum(task.loss(projections, [weighted[:, t] for weighted in strata]) for t in range(3)) / 3
    torch.testing.assert_close(task.loss(projections, targets, strata), expected)


def test_every_stratum_counts_and_the_mixed_derivative_does_not_vanish(double):
    task, projections, targets = started()
    strata = [torch.randn(5, 3, 4, requires_grad=True) for _ in range(2)]
    z = projections[0].requires_grad_()
    loss = task.loss(projections, targets, strata)
    grads = torch.autograd.grad(loss, strata, create_graph=True)
    assert all((grad.abs().sum(dim=(0, 2)) > 0).all() for grad in grads)
    (mixed,) = torch.autograd.grad(sum(grad.square().sum() for grad in grads), z)
    assert mixed.abs().sum() > 0


def test_unequal_numbers_of_strata():
    task, projections, targets = started()
    with pytest.raises(RuntimeError, match="equal size"):
        task.loss(projections, targets, [torch.randn(5, 3, 4), torch.randn(5, 2, 4)])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gamma": -1}, "method_kwargs.task_kwargs.gamma must be >= 0, got -1"),
        ({"kernel": "rbf"}, "method_kwargs.task_kwargs.kernel must be one of gaussian, imq, linear"),
        ({"scale": 0}, "method_kwargs.task_kwargs.scale must be >= 0.01"),
        ({"pred_hidden_dim": 0}, "method_kwargs.task_kwargs.pred_hidden_dim must be >= 1"),
        ({"base_momentum": 1.5}, "method_kwargs.task_kwargs.base_momentum must be between"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        SSLHSIC(6, **settings)
