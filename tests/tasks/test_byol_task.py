from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks.byol import BYOL

CONFIG = Path(__file__).resolve().parents[2] / "scripts/pretrain/task/byol.yaml"


def build(**kwargs):
    torch.manual_seed(0)
    task = BYOL(6, **{"proj_hidden_dim": 8, "proj_output_dim": 4, **kwargs})
    task.init_target(nn.Identity())
    with torch.no_grad():  # or the target would be the head itself
        for weight in task.target.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return task


def views(count, images=5, dim=4):
    torch.manual_seed(1)
    return [torch.randn(images, dim) for _ in range(count)]


@pytest.mark.parametrize(("crops", "large"), [(2, 2), (3, 3), (4, 2), (3, 1)])
def test_against_loops(double, crops, large):
    task, z, targets = build(), views(crops), views(crops + large)[crops:]
    predictions = [task.predictor(view).detach() for view in z]
    terms = [
        float((F.normalize(predictions[j][i], dim=0) - F.normalize(targets[k][i], dim=0)).pow(2).sum())
        for j in range(crops)
        for k in range(large)
        if j != k
        for i in range(5)
    ]
    assert task.loss(z, targets).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_order_of_views_and_images_and_length_of_targets_do_not_count(double):
    task, z, targets = build(), views(2), views(4)[2:]
    expected, order = task.loss(z, targets), torch.randperm(5)
    torch.testing.assert_close(task.loss(z[::-1], targets[::-1]), expected)
    permuted = task.loss([view[order] for view in z], [3 * view[order] for view in targets])
    torch.testing.assert_close(permuted, expected)


def test_targets_are_the_target_networks_projections(double):
    task, feats = build(), views(2, dim=6)
    _, z, targets = task(feats, feats)
    torch.testing.assert_close(targets[0], task.target.head(feats[0]))
    assert not any(view.requires_grad for view in targets)
    torch.testing.assert_close(task(feats, feats).loss, task.loss(z, targets))


@pytest.mark.parametrize("level", ["features", "projection"])
def test_weights_of_one_give_the_loss_itself(double, level):
    task, feats = build(), views(3, dim=6)
    weights = torch.ones(5, 3, 6 if level == "features" else 4)
    contrast, adjusted = InterventionalTask(task, level)(feats, weights, feats[:2])
    torch.testing.assert_close(adjusted, contrast.loss)


def test_every_stratum_moves_the_heads_gradient(double):
    """The mixed second derivative: of L_msr with respect to heads and A."""
    task, feats = build(), views(2, dim=6)
    weights = torch.rand(5, 3, 6, requires_grad=True)
    _, adjusted = InterventionalTask(task, "features")(feats, weights, feats)
    heads = [param for param in task.parameters() if param.requires_grad]
    first = torch.autograd.grad(adjusted, heads, create_graph=True)
    (second,) = torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in first), weights)
    assert (second.abs().sum(dim=(0, 2)) > 1e-8).all()
    assert all(param.grad is None and not param.requires_grad for param in task.target.parameters())


def test_loss_is_twice_differentiable(double):
    task = build()
    inputs = [view.requires_grad_() for view in views(3, images=3)]

    def loss(a, b, target):
        return task.loss([a, b], [target, target])

    assert torch.autograd.gradgradcheck(loss, inputs)


def test_the_predictor_sees_unweighted_projections_alone():
    task, feats, seen = build(), views(2, dim=6), []
    _, z, _ = task(feats, feats)
    task.predictor.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    task.loss(z, feats, [torch.randn(5, 3, 4) for _ in range(2)])
    assert [id(view) for view in seen] == [id(view) for view in z]


def test_momentum_goes_from_base_to_final():
    for progress, momentum in ((0.0, 0.99), (0.5, 0.995), (1.0, 1.0)):
        task = build()
        old = task.target.head[0].weight.clone()
        task.after_step(nn.Identity(), progress)
        expected = momentum * old + (1 - momentum) * task.projector[0].weight
        torch.testing.assert_close(task.target.head[0].weight, expected)


def test_smallest_batches():
    task = build()
    assert task.loss(views(2, images=2), views(2, images=2)).isfinite()
    one = views(2, images=1)
    assert task.eval().loss(one, one).isfinite()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        task.train().loss(one, one)
    with pytest.raises(ValueError, match="two or more"):
        task.loss(views(1), views(1))


def test_settings():
    task = BYOL(6, proj_hidden_dim=8, proj_output_dim=4)
    assert task.projection_dim == 4
    assert task.predictor[0].weight.shape == (8, 4)  # as wide as the head
    assert BYOL(6, 8, 4, pred_hidden_dim=3).predictor[0].weight.shape == (3, 4)
    for change, message in (
        ({"pred_hidden_dim": 0}, "task_kwargs.pred_hidden_dim must be >= 1, got 0"),
        ({"base_momentum": 1.5}, "task_kwargs.base_momentum must be between 0 and"),
    ):
        with pytest.raises(UserError, match=message):
            BYOL(6, 8, 4, **change)


def test_config_is_the_defaults():
    kwargs = OmegaConf.to_container(OmegaConf.load(CONFIG)).pop("task_kwargs")
    ours, default = BYOL(6, **kwargs), BYOL(6)
    assert str(ours) == str(default)
    assert (ours.base_momentum, ours.final_momentum) == (default.base_momentum, default.final_momentum)
