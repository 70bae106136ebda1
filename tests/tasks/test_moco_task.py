import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.losses.moco import moco_loss
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks.moco import MoCo


@pytest.fixture
def trunk(double):
    torch.manual_seed(0)
    return nn.Linear(7, 8)


@pytest.fixture
def task(trunk):
    task = MoCo(8, proj_hidden_dim=12, proj_output_dim=5, temperature=0.3, queue_size=32)
    task.init_target(trunk)
    with torch.no_grad():
        task.target.head[0].weight.mul_(0.5).add_(0.1)  # away from the online head
    return task


def features(views=2):
    return [torch.randn(6, 8) for _ in range(views)]


@pytest.mark.parametrize("views", [2, 4])
def test_queries_are_of_all_views_and_keys_of_the_large_crops(task, views):
    feats, target_feats = features(views), features()
    _, queries, keys = task(feats, target_feats)
    for key, h in zip(keys, target_feats):
        torch.testing.assert_close(key, task.target.head(h))
    expected = moco_loss([task.projector(h) for h in feats], keys, task.queue.entries, 0.3)
    torch.testing.assert_close(task(feats, target_feats).loss, expected)
    torch.testing.assert_close(task.loss(queries, keys), expected)


def test_one_image_has_the_queue_for_negatives(task):
    task.eval()
    feats = [h[:1] for h in features()]
    expected = moco_loss(*task(feats, feats)[1:], task.queue.entries, 0.3)
    assert task(feats, feats).loss == expected


def test_weighted_keys_go_through_the_targets_head(task):
    feats, target_feats, weights = features(3), features(), torch.rand(6, 3, 8)
    _, adjusted = InterventionalTask(task, "features")(feats, weights, target_feats)
    strata = [torch.stack([task.target.head(h * a) for a in weights.unbind(1)], dim=1) for h in target_feats]
    queries = [task.projector(h) for h in feats]
    torch.testing.assert_close(adjusted, moco_loss(queries, strata, task.queue.entries, 0.3))


def test_strata_that_weigh_nothing_give_the_loss_itself(task):
    _, queries, keys = task(features(3), features())
    weighted = [key[:, None].repeat(1, 3, 1) for key in keys]
    torch.testing.assert_close(task.loss(queries, keys, weighted), task.loss(queries, keys))


def test_every_stratum_counts_and_has_a_mixed_second_derivative(task):
    weights = torch.rand(6, 3, 8, requires_grad=True)
    _, adjusted = InterventionalTask(task, "features")(features(), weights, features())
    parameters = [p for p in task.parameters() if p.requires_grad]
    assert len(parameters) == len(list(task.projector.parameters()))
    inner = torch.autograd.grad(adjusted, parameters, create_graph=True)
    (first,) = torch.autograd.grad(adjusted, weights, retain_graph=True)
    assert (first.abs().sum(dim=(0, 2)) > 0).all()
    (mixed,) = torch.autograd.grad(sum(g.pow(2).sum() for g in inner), weights)
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


def test_only_after_batch_changes_the_queue(task):
    _, queries, keys = task(features(), features())
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.loss(queries, keys)
    task.loss(queries, keys, [key[:, None] for key in keys])
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task.after_batch(queries, keys)
    torch.testing.assert_close(task.queue.entries[:12], F.normalize(torch.cat(keys), dim=1))
    assert task.queue.position == 12
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"queue.entries", "queue.position"}


@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_the_target_follows_at_one_pace_throughout(task, trunk, progress):
    before = task.target.head[0].weight.clone()
    task.after_step(trunk, progress)
    expected = 0.999 * before + 0.001 * task.projector[0].weight
    torch.testing.assert_close(task.target.head[0].weight, expected)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0}, "task_kwargs.temperature must be > 0"),
        ({"queue_size": 0}, "task_kwargs.queue_size must be an integer >= 1"),
        ({"queue_size": 1.5}, "task_kwargs.queue_size must be an integer >= 1"),
        ({"base_momentum": 1.1}, "task_kwargs.base_momentum must be between 0"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(UserError, match=message):
        MoCo(8, 12, 5, **kwargs)
