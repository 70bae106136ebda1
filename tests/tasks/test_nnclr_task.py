import copy

import pytest
import torch
import torch.nn.functional as F

from metamask_plugin.errors import UserError
from metamask_plugin.losses.nnclr import nearest_neighbours, nnclr_loss
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks.nnclr import NNCLR

SIZES = {"proj_hidden_dim": 12, "proj_output_dim": 5, "pred_hidden_dim": 9}


@pytest.fixture
def task(double):
    torch.manual_seed(0)
    return NNCLR(8, **SIZES, temperature=0.3, queue_size=32)


def features(views=2):
    return [torch.randn(6, 8) for _ in range(views)]


def neighbours(task, projections):
    return [nearest_neighbours(z, task.support.entries) for z in projections]


@pytest.mark.parametrize("views", [2, 3])
def test_neighbours_of_projections_find_predictions(task, views):
    feats = features(views)
    z = [task.projector(h) for h in feats]
    expected = nnclr_loss(neighbours(task, z), [task.predictor(view) for view in z], 0.3)
    torch.testing.assert_close(task(feats).loss, expected)


def test_the_anchors_pass_no_gradient_on(task):
    _, z, _ = task(features(), None)
    z = [view.detach().requires_grad_() for view in z]
    fixed = neighbours(task, z)
    expected = torch.autograd.grad(nnclr_loss(fixed, [task.predictor(view) for view in z], 0.3), z)
    for ours, theirs in zip(torch.autograd.grad(task.loss(z), z), expected):
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().sum() > 0


def test_weighted_positives_are_predicted_stratum_by_stratum(task):
    feats, weights = features(), torch.rand(6, 3, 8)
    _, adjusted = InterventionalTask(task, "features")(feats, weights)
    z = [task.projector(h) for h in feats]
    weighted = [[task.projector(h * a) for a in weights.unbind(1)] for h in feats]
    predictions = [task.predictor(view) for view in z]
    strata = [torch.stack([task.predictor(s) for s in view], dim=1) for view in weighted]
    expected = nnclr_loss(neighbours(task, z), predictions, 0.3, strata)
    torch.testing.assert_close(adjusted, expected)
    together = [task.predictor(torch.cat(view)).unflatten(0, (3, 6)).transpose(0, 1) for view in weighted]
    other = nnclr_loss(neighbours(task, z), predictions, 0.3, together)
    assert (other - expected).abs() > 1e-4  # BatchNorm tells the strata as one batch from each as its own


def test_strata_that_weigh_nothing_give_the_loss_itself(task):
    _, z, _ = task(features(), None)
    weighted = [view[:, None].repeat(1, 3, 1) for view in z]
    torch.testing.assert_close(task.loss(z, None, weighted), task.loss(z))


def test_every_stratum_counts_and_has_a_mixed_second_derivative(task):
    weights = torch.rand(6, 3, 8, requires_grad=True)
    _, adjusted = InterventionalTask(task, "features")(features(), weights)
    inner = torch.autograd.grad(adjusted, list(task.parameters()), create_graph=True)
    (first,) = torch.autograd.grad(adjusted, weights, retain_graph=True)
    assert (first.abs().sum(dim=(0, 2)) > 0).all()
    (mixed,) = torch.autograd.grad(sum(g.pow(2).sum() for g in inner), weights)
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


def test_both_heads_statistics_see_each_batch_once(task):
    reference, feats = copy.deepcopy(task), features()
    InterventionalTask(task, "features")(feats, torch.rand(6, 3, 8) * 100)
    reference(feats)
    expected = reference.state_dict()
    running = [name for name in expected if "running" in name]
    assert any(name.startswith("predictor") for name in running)
    assert all(torch.equal(task.state_dict()[name], expected[name]) for name in running)


def test_only_after_batch_changes_the_support_set(task):
    _, z, _ = task(features(), None)
    task.eval()  # running statistics aside
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.loss(z)
    task.loss(z, None, [view[:, None] for view in z])
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task.after_batch(z, None)
    torch.testing.assert_close(task.support.entries[:6], F.normalize(z[0].detach(), dim=1))
    assert task.support.position == 6
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"support.entries", "support.position"}


def test_one_image_has_no_negatives(task):
    with pytest.raises(ValueError, match="needs a negative"):
        task.eval()([h[:1] for h in features()])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0}, "task_kwargs.temperature must be > 0"),
        ({"queue_size": 0}, "task_kwargs.queue_size must be an integer >= 1"),
        ({"pred_hidden_dim": 0}, "task_kwargs.pred_hidden_dim must be >= 1"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(UserError, match=message):
        NNCLR(8, **{**SIZES, **kwargs})
