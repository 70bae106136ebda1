import inspect
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from metamask_plugin.data.views import parse_augmentations
from metamask_plugin.errors import UserError
from metamask_plugin.losses.ressl import relation_loss
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks.ressl import ReSSL

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts/pretrain"


def build(**kwargs):
    torch.manual_seed(0)
    settings = {"proj_hidden_dim": 8, "proj_output_dim": 4, "queue_size": 7, "online_temperature": 0.3}
    task = ReSSL(6, **{**settings, "target_temperature": 0.2, **kwargs})
    task.init_target(nn.Identity())
    with torch.no_grad():  # or the target would be the head itself
        for weight in task.target.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return task


def views(count, images=5, dim=4):
    torch.manual_seed(1)
    return [torch.randn(images, dim) for _ in range(count)]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("crops", "large"), [(2, 2), (3, 3), (4, 2), (3, 1)])
def test_against_loops(double, symmetric, crops, large):
    task, z, targets = build(symmetric=symmetric), views(crops), views(crops + large)[crops:]
    terms = [
        float(relation_loss(z[j], targets[k], task.queue.entries, 0.3, 0.2))
        for k in range(large if symmetric else 1)
        for j in range(crops)
        if j != k
    ]
    assert len(terms) == (large * (crops - 1) if symmetric else crops - 1)
    assert task.loss(z, targets).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_the_weak_view_is_no_anchor_and_the_strong_one_no_target(double):
    z = [view.requires_grad_() for view in views(2)]
    targets = [view.requires_grad_() for view in views(4)[2:]]
    for symmetric in (False, True):
        loss = build(symmetric=symmetric).loss(z, targets)
        gradients = torch.autograd.grad(loss, [z[0], targets[1]], allow_unused=True)
        assert all((gradient is not None) == symmetric for gradient in gradients)


def test_symmetric_loss_does_not_know_the_order_of_views(double):
    task, z, targets = build(symmetric=True), views(2), views(4)[2:]
    torch.testing.assert_close(task.loss(z[::-1], targets[::-1]), task.loss(z, targets))


def test_targets_are_the_target_networks_projections(double):
    task, feats = build(), views(2, dim=6)
    _, z, targets = task(feats, feats)
    torch.testing.assert_close(targets[0], task.target.head(feats[0]))
    assert not any(view.requires_grad for view in targets)
    torch.testing.assert_close(task(feats, feats).loss, task.loss(z, targets))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("level", ["features", "projection"])
def test_weights_of_one_give_the_loss_itself(double, level, symmetric):
    task, feats = build(symmetric=symmetric), views(3, dim=6)
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


def test_the_queue_takes_the_first_targets_once_a_batch():
    for symmetric in (False, True):
        task, z, targets = build(symmetric=symmetric), views(2), views(4)[2:]
        before = {name: value.clone() for name, value in task.state_dict().items()}
        loss = task.loss(z, targets)
        task.loss(z, targets, [torch.randn(5, 3, 4) for _ in range(2)])
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())

        task.after_batch(z, targets)
        torch.testing.assert_close(task.queue.entries[:5], nn.functional.normalize(targets[0], dim=1))
        assert torch.equal(task.queue.entries[5:], before["queue.entries"][5:])
        assert task.queue.position == 5
        assert task.loss(z, targets) != loss  # now it is related to them


@pytest.mark.parametrize("final, at_half, at_end", [(None, 0.99, 0.99), (1.0, 0.995, 1.0)])
def test_momentum_stays_unless_told_where_to_go(final, at_half, at_end):
    for progress, momentum in ((0.0, 0.99), (0.5, at_half), (1.0, at_end)):
        task = build(final_momentum=final)
        old = task.target.head[0].weight.clone()
        task.after_step(nn.Identity(), progress)
        expected = momentum * old + (1 - momentum) * task.projector[0].weight
        torch.testing.assert_close(task.target.head[0].weight, expected)


def test_smallest_batches():
    task = build()
    for images in (1, 2):  # what relates them is the queue: the loss itself wants no second image
        assert task.loss(views(2, images), views(2, images)).isfinite()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        task.project(torch.randn(1, 6))
    with pytest.raises(ValueError, match="two or more"):
        task.loss(views(1), views(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queue_size": 1}, "task_kwargs.queue_size must be an integer >= 2, got 1"),
        ({"queue_size": 2.5}, "task_kwargs.queue_size must be an integer >= 2, got 2.5"),
        ({"online_temperature": 0}, "task_kwargs.online_temperature must be > 0, got 0"),
        ({"target_temperature": -1}, "task_kwargs.target_temperature must be > 0, got -1"),
        ({"final_momentum": 0.5}, "task_kwargs.base_momentum must be between 0 and final_momentum"),
    ],
)
def test_wrong_settings(change, message):
    with pytest.raises(UserError, match=message):
        ReSSL(6, 8, 4, **change)


def test_config_is_the_defaults():
    kwargs = OmegaConf.to_container(OmegaConf.load(SCRIPTS / "task/ressl.yaml")).pop("task_kwargs")
    defaults = {name: p.default for name, p in inspect.signature(ReSSL).parameters.items()}
    assert kwargs == {name: defaults[name] for name in kwargs}
    assert ReSSL(6, **kwargs).projection_dim == kwargs["proj_output_dim"]


@pytest.mark.parametrize("path", sorted(SCRIPTS.rglob("views/ressl.yaml")), ids=lambda path: path.parts[-3])
def test_the_views_that_it_is_given(path):
    weak, strong, original = parse_augmentations(OmegaConf.load(path))
    drawn = ("color_jitter", "grayscale", "gaussian_blur", "solarization", "equalization")
    assert not any(getattr(weak, operation) for operation in drawn)
    assert weak.crop_scale is not None
    assert any(getattr(strong, operation) for operation in drawn)
    assert (weak.num_crops, strong.num_crops) == (1, 1)
    assert weak.crop_size == strong.crop_size != original.crop_size  # two large crops
