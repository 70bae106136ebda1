import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.losses.relic import relic_loss
from metamask_plugin.tasks.relic import RELIC


def started(**settings):
    """A task on 6 features with its target network, and one batch: projections, targets, strata."""
    torch.manual_seed(0)
    task = RELIC(6, **{"proj_hidden_dim": 8, "proj_output_dim": 4, "pred_hidden_dim": 8, **settings})
    task.init_target(nn.Linear(3, 6))
    return task, [torch.randn(5, 4) for _ in range(3)], [torch.randn(5, 4) for _ in range(2)]


def test_is_the_loss_of_predictions_and_targets(double):
    task, _, _ = started(temperature=0.3, alpha=2.0, bank_size=7)
    task.eval()
    views = [torch.randn(5, 6) for _ in range(3)]
    targets = [torch.randn(5, 6) for _ in range(2)]
    expected = relic_loss(
        [task.predictor(task.projector(h)) for h in views],
        [task.target.head(h) for h in targets],
        0.3,
        2.0,
        task.bank.entries,
    )
    torch.testing.assert_close(task(views, targets).loss, expected)
    assert task.project(views[0]).shape == (5, task.projection_dim)


def test_the_target_has_no_predictor():
    task, _, _ = started()
    torch.testing.assert_close(task.target.head.state_dict(), task.projector.state_dict())


def test_without_predictor_both_branches_have_one_head():
    task, _, _ = started(pred_hidden_dim=0)
    feats = torch.randn(5, 6)
    torch.testing.assert_close(task.eval().project(feats), task.project_key(feats))


def test_bank_takes_the_targets_once_a_batch():
    task, projections, targets = started(bank_size=12)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.loss(projections, targets)
    task.loss(projections, targets, [h[:, None] for h in targets])
    torch.testing.assert_close(task.state_dict(), before, rtol=0, atol=0)
    task.after_batch(projections, targets)
    assert task.bank.position == 10
    expected = nn.functional.normalize(torch.cat(targets), dim=1)
    torch.testing.assert_close(task.bank.entries[:10], expected)


def test_unweighted_strata_give_the_loss(double):
    task, projections, targets = started(bank_size=7)
    strata = [h[:, None].expand(-1, 3, -1) for h in targets]
    torch.testing.assert_close(task.loss(projections, targets, strata), task.loss(projections, targets))


def test_every_stratum_counts_and_the_mixed_derivative_does_not_vanish(double):
    task, projections, targets = started()
    strata = [torch.randn(5, 3, 4, requires_grad=True) for _ in range(2)]
    z = projections[0].requires_grad_()
    loss = task.loss(projections, targets, strata)
    grads = torch.autograd.grad(loss, strata, create_graph=True)
    assert all((grad.abs().sum(dim=(0, 2)) > 0).all() for grad in grads)
    (mixed,) = torch.autograd.grad(sum(grad.square().sum() for grad in grads), z)
    assert mixed.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0}, "method_kwargs.task_kwargs.temperature must be > 0, got 0"),
        ({"alpha": -1}, "method_kwargs.task_kwargs.alpha must be >= 0"),
        ({"pred_hidden_dim": -1}, "method_kwargs.task_kwargs.pred_hidden_dim must be >= 0"),
        ({"base_momentum": 1.5}, "method_kwargs.task_kwargs.base_momentum must be between"),
        ({"bank_size": -1}, "method_kwargs.task_kwargs.bank_size must be an integer >= 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=message):
        RELIC(6, **settings)
