import copy

import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.losses import backdoor_adjusted_loss
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks import SimCLR, SimSiam, Task


@pytest.fixture
def task():
    torch.manual_seed(0)
    return SimCLR(8, proj_hidden_dim=12, proj_output_dim=5, temperature=0.3)


def features(count=6):
    return [torch.randn(count, 8) for _ in range(2)]


def test_features_are_weighted_before_the_head(task):
    feats, weights = features(), torch.rand(6, 3, 8)
    contrast, adjusted = InterventionalTask(task, "features")(feats, weights)
    torch.testing.assert_close(contrast.loss, task(feats).loss)
    strata = [torch.stack([task.project(h * weights[:, t]) for t in range(3)], dim=1) for h in feats]
    expected = backdoor_adjusted_loss([task.project(h) for h in feats], strata, 0.3)
    torch.testing.assert_close(adjusted, expected)


def test_projections_are_weighted_behind_the_head(task):
    feats, weights = features(), torch.rand(6, 3, 5)
    _, adjusted = InterventionalTask(task, "projection")(feats, weights)
    z = [task.project(h) for h in feats]
    expected = backdoor_adjusted_loss(z, [view[:, None] * weights for view in z], 0.3)
    torch.testing.assert_close(adjusted, expected)


class Average(nn.Module):
    def forward(self, feature_map):
        return feature_map.mean(dim=(2, 3))


def test_before_an_average_the_map_is_the_features_by_another_route(task):
    maps, weights = [torch.randn(6, 8, 3, 3) for _ in range(2)], torch.rand(6, 4, 8)
    by_map = InterventionalTask(task, "feature_map", Average())(maps, weights)
    by_features = InterventionalTask(task, "features")([m.mean(dim=(2, 3)) for m in maps], weights)
    torch.testing.assert_close(by_map[1], by_features[1])
    torch.testing.assert_close(by_map[0].loss, by_features[0].loss)


def test_before_anything_else_it_is_not(task):
    tail = nn.Sequential(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8, 8))
    maps, weights = [torch.randn(6, 8, 3, 3) for _ in range(2)], torch.rand(6, 4, 8)
    _, by_map = InterventionalTask(task, "feature_map", tail)(maps, weights)
    _, by_features = InterventionalTask(task, "features")([tail(m) for m in maps], weights)
    assert (by_map - by_features).abs() > 1e-4


def test_weighted_features_leave_the_running_statistics_alone(task):
    reference = copy.deepcopy(task)
    feats = features()
    InterventionalTask(task, "features")(feats, torch.rand(6, 3, 8) * 100)
    reference(feats)
    norm, expected = task.projector[1], reference.projector[1]
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert norm.momentum == 0.1


class Predicting(SimCLR):
    """Sends the batch and the strata through one more BatchNorm within both losses."""

    def __init__(self):
        super().__init__(8, proj_hidden_dim=12, proj_output_dim=5)
        self.predictor = nn.BatchNorm1d(5)

    def loss(self, projections, targets=None, positives=None):
        if positives is not None:
            positives = [torch.stack([self.predictor(s) for s in z.unbind(1)], dim=1) for z in positives]
        return super().loss([self.predictor(z) for z in projections], None, positives)


@pytest.mark.parametrize("level", ["features", "projection"])
def test_nor_does_what_the_adjusted_loss_normalises(level):
    torch.manual_seed(0)
    task, feats = Predicting(), features()
    reference = copy.deepcopy(task)
    weights = torch.rand(6, 3, 8 if level == "features" else 5) * 100
    InterventionalTask(task, level)(feats, weights)
    reference(feats)
    assert torch.equal(task.predictor.running_mean, reference.predictor.running_mean)
    assert torch.equal(task.predictor.running_var, reference.predictor.running_var)
    assert task.predictor.momentum == 0.1


def test_the_task_is_told_which_view_a_stratum_is_of(task, monkeypatch):
    seen = []
    project = type(task).project_key
    monkeypatch.setattr(task, "project_key", lambda h, view: seen.append(view) or project(task, h, view))
    InterventionalTask(task, "features")(features(), torch.rand(6, 3, 8))
    assert seen == [0, 0, 0, 1, 1, 1]


def test_without_weights_there_is_one_loss(task):
    feats = features()
    contrast, adjusted = InterventionalTask(task, "features")(feats, None)
    assert adjusted is None
    assert torch.equal(contrast.loss, task(feats).loss)


def test_a_task_without_such_a_form_says_so():
    class Plain(Task):
        projection_dim = 8

        def project(self, feats, view=0):
            return feats

        def loss(self, projections, targets=None):
            return projections[0].sum()

    with pytest.raises(UserError, match="must have a backdoor-adjusted form, got Plain"):
        InterventionalTask(Plain(8), "features")(features(), torch.rand(6, 3, 8))


def test_under_a_stop_gradient_what_lies_behind_the_map_gets_none_either():
    torch.manual_seed(0)
    task = SimSiam(8, proj_hidden_dim=12, proj_output_dim=6)
    tail = nn.Sequential(nn.MaxPool2d(3), nn.Flatten(), nn.Linear(8, 8))
    maps = [torch.randn(6, 8, 3, 3) for _ in range(2)]
    weights = torch.rand(6, 4, 8, requires_grad=True)
    interventional = InterventionalTask(task, "feature_map", tail)
    feats = [tail(m).detach() for m in maps]  # the anchors' way, cut off
    _, adjusted = interventional(maps, weights, feats=feats)
    to_weights, *to_tail = torch.autograd.grad(adjusted, [weights, *tail.parameters()], allow_unused=True)
    assert to_weights.abs().max() > 0
    assert all(gradient is None for gradient in to_tail)
