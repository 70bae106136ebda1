import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from metamask_plugin.errors import UserError
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks.simsiam import SimSiam

CONFIG = Path(__file__).resolve().parents[2] / "scripts/pretrain/task/simsiam.yaml"


def build():
    torch.manual_seed(0)
    return SimSiam(6, proj_hidden_dim=7, proj_output_dim=4, pred_hidden_dim=3)


def views(count, images=5, dim=4):
    torch.manual_seed(1)
    return [torch.randn(images, dim) for _ in range(count)]


@pytest.mark.parametrize("crops", [2, 3])
def test_against_loops(double, crops):
    task, z = build(), views(crops)
    p = [task.predictor(view).detach() for view in z]
    terms = [
        -float(F.normalize(p[j][i], dim=0) @ F.normalize(z[k][i], dim=0))
        for j in range(crops)
        for k in range(crops)
        if j != k
        for i in range(5)
    ]
    assert task.loss(z).item() == pytest.approx(sum(terms) / len(terms), rel=1e-12)


def test_order_of_views_and_images_does_not_count(double):
    task, z = build(), views(3)
    expected, order = task.loss(z), torch.randperm(5)
    torch.testing.assert_close(task.loss(z[::-1]), expected)
    torch.testing.assert_close(task.loss([view[order] for view in z]), expected)


def test_positives_of_the_loss_get_no_gradient(double):
    task = build()
    z = [view.requires_grad_() for view in views(2)]
    ours = torch.autograd.grad(task.loss(z), z)
    constants = [view.detach()[:, None] for view in z]
    expected = torch.autograd.grad(task.loss(z, None, constants), z)
    torch.testing.assert_close(ours, expected)
    # with the gradient, it would be another one
    through = torch.autograd.grad(task.loss(z, None, [view[:, None] for view in z]), z)
    assert (through[0] - ours[0]).abs().max() > 1e-3


def test_positive_branch_has_a_gradient_to_its_input_alone(double):
    task = build()
    feats = views(1, dim=6)[0].requires_grad_()
    z = task.project_key(feats)
    torch.testing.assert_close(z, task.project(feats))
    assert torch.autograd.grad(z[0, 0], feats, retain_graph=True)[0].any()
    weights = list(task.projector.parameters())
    gradients = torch.autograd.grad(z[0, 0], weights, allow_unused=True)
    assert len(weights) == 9 and all(gradient is None for gradient in gradients)
    assert all(weight.requires_grad for weight in weights)


def test_positive_branch_follows_replaced_parameters_and_buffers(double):
    """As the bi-level engine calls it: its parameters, and copies of the buffers."""
    task, feats = build(), views(2, dim=6)
    weights = torch.rand(5, 3, 6, requires_grad=True)
    other = copy.deepcopy(task)
    with torch.no_grad():
        for param in other.parameters():
            param.add_(0.2 * torch.randn_like(param))
        for name, buffer in other.named_buffers():
            if "running" in name:
                buffer.add_(torch.rand_like(buffer))

    for training in (True, False):
        task.train(training)
        other.train(training)
        wrapped = InterventionalTask(task, "features")
        replaced = {f"task.{name}": p.detach().requires_grad_() for name, p in other.named_parameters()}
        buffers = {f"task.{name}": buffer.clone() for name, buffer in other.named_buffers()}
        before = {name: value.clone() for name, value in task.state_dict().items()}
        ours = torch.func.functional_call(wrapped, {**replaced, **buffers}, (feats, weights))
        theirs = InterventionalTask(other, "features")(feats, weights)
        torch.testing.assert_close(ours, theirs)
        gradients = torch.autograd.grad(ours[1], [*replaced.values(), weights], allow_unused=True)
        expected = torch.autograd.grad(theirs[1], [*other.parameters(), weights], allow_unused=True)
        torch.testing.assert_close(gradients, expected)
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
        # what BatchNorm keeps went to the copies
        assert all(
            torch.equal(buffers[f"task.{name}"], value)
            for name, value in other.named_buffers()
            if "running" in name
        )


@pytest.mark.parametrize("level", ["features", "projection"])
def test_of_the_weighted_branch_only_a_gets_a_gradient(double, level):
    task = build()
    feats = [view.requires_grad_() for view in views(2, dim=6)]
    weights = torch.rand(5, 3, 6 if level == "features" else 4, requires_grad=True)
    _, adjusted = InterventionalTask(task, level)(feats, weights)
    receivers = [*feats, *task.parameters()]
    ours = torch.autograd.grad(adjusted, receivers, retain_graph=True)
    assert torch.autograd.grad(adjusted, weights)[0].any()

    z = [task.project(view) for view in feats]
    if level == "features":
        strata = [torch.stack([task.project(view * a) for a in weights.unbind(1)], 1) for view in feats]
    else:
        strata = [view[:, None] * weights for view in z]
    constant = task.loss(z, None, [view.detach() for view in strata])
    torch.testing.assert_close(ours, torch.autograd.grad(constant, receivers))


@pytest.mark.parametrize("level", ["features", "projection"])
def test_weights_of_one_give_the_loss_itself(double, level):
    task, feats = build(), views(3, dim=6)
    contrast, adjusted = InterventionalTask(task, level)(
        feats, torch.ones(5, 2, 6 if level == "features" else 4)
    )
    torch.testing.assert_close(adjusted, contrast.loss)


def test_every_stratum_moves_the_heads_gradient(double):
    """The mixed second derivative: of L_msr with respect to heads and A."""
    task, feats = build(), views(2, dim=6)
    weights = torch.rand(5, 3, 6, requires_grad=True)
    _, adjusted = InterventionalTask(task, "features")(feats, weights)
    first = torch.autograd.grad(adjusted, list(task.parameters()), create_graph=True)
    (second,) = torch.autograd.grad(sum((g * torch.randn_like(g)).sum() for g in first), weights)
    assert (second.abs().sum(dim=(0, 2)) > 1e-8).all()


def test_loss_is_twice_differentiable(double):
    task, constants = build(), views(4, images=3)[2:]
    inputs = [view.requires_grad_() for view in views(2, images=3)]

    def loss(a, b):  # the stop-gradient would mislead numerical derivatives
        return task.loss([a, b], None, [view[:, None] for view in constants])

    assert torch.autograd.gradgradcheck(loss, inputs)


def test_smallest_batches():
    task = build()
    assert task.loss(views(2, images=2)).isfinite()
    one = views(2, images=1)
    assert task.eval().loss(one).isfinite()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        task.train().loss(one)
    with pytest.raises(ValueError, match="two or more"):
        task.loss(views(1))


def test_settings():
    task = SimSiam(6, proj_hidden_dim=7, proj_output_dim=8)
    assert (task.projection_dim, task.stop_gradient) == (8, True)
    assert task.predictor[0].weight.shape == (2, 8)  # a quarter
    assert isinstance(task.projector[-1], torch.nn.BatchNorm1d) and len(task.projector) == 8
    assert SimSiam(6, 7, 2).predictor[0].weight.shape == (1, 2)
    assert len(SimSiam(6, 7, 4, proj_layers=2).projector) == 5
    for change, message in (
        ({"pred_hidden_dim": 0}, "task_kwargs.pred_hidden_dim must be >= 1, got 0"),
        ({"proj_layers": 0}, "task_kwargs.proj_layers must be >= 1, got 0"),
    ):
        with pytest.raises(UserError, match=message):
            SimSiam(6, 7, 4, **change)


def test_config_is_the_defaults():
    kwargs = OmegaConf.to_container(OmegaConf.load(CONFIG)).pop("task_kwargs")
    assert str(SimSiam(6, **kwargs)) == str(SimSiam(6))
