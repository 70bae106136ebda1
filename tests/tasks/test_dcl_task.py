"""DCL, and what HCL shares with it."""

import copy
import math

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.losses import backdoor_adjusted_loss
from metamask_plugin.tasks.dcl import DCL
from metamask_plugin.tasks.hcl import HCL

SMALL = {"proj_hidden_dim": 12, "proj_output_dim": 5}
both = pytest.mark.parametrize("task_class", [DCL, HCL])


def projections(views=2, images=6):
    torch.manual_seed(0)
    return [torch.randn(images, 5) for _ in range(views)]


def loop_oracle(views, tau_plus, temperature, beta, bank=()):
    """Every view an anchor of every other, against all views of the other images and the bank."""
    units, terms = [[z / z.norm() for z in view] for view in views], []
    for j, anchors in enumerate(units):
        for k, positives in enumerate(units):
            for i, anchor in enumerate(anchors if j != k else []):
                others = [view[other] for view in units for other in range(len(view)) if other != i]
                e = [math.exp(float(anchor @ other) / temperature) for other in [*others, *bank]]
                p = math.exp(float(anchor @ positives[i]) / temperature)
                weights = [x**beta for x in e]
                total = len(e) * sum(w * x for w, x in zip(weights, e)) / sum(weights)
                estimate = (total - len(e) * tau_plus * p) / (1 - tau_plus)
                terms.append(-math.log(p / (p + max(estimate, len(e) * math.exp(-1 / temperature)))))
    return sum(terms) / len(terms)


@both
@pytest.mark.parametrize(("views", "images"), [(2, 6), (3, 4), (2, 2)])
@pytest.mark.parametrize("bank_size", [0, 7])
def test_against_loops(double, task_class, views, images, bank_size):
    task = task_class(8, **SMALL, temperature=0.3, tau_plus=0.2, bank_size=bank_size)
    z = projections(views, images)
    expected = loop_oracle(z, 0.2, 0.3, task.beta, task.bank.entries)
    assert task.loss(z).item() == pytest.approx(expected, rel=1e-10)


@both
def test_neither_the_order_of_images_nor_of_views_nor_length_counts(double, task_class):
    task, z = task_class(8, **SMALL), projections(3)
    value, order = task.loss(z), torch.randperm(6)
    torch.testing.assert_close(task.loss([view[order] for view in z]), value)
    torch.testing.assert_close(task.loss([z[2], z[0], z[1]]), value)
    torch.testing.assert_close(task.loss([view * 7 for view in z]), value)


def test_uncorrected_it_is_the_plain_contrastive_loss():
    z, weighted = projections(), [torch.randn(6, 3, 5) for _ in range(2)]
    task = DCL(8, **SMALL, temperature=0.3, tau_plus=0)
    assert torch.equal(task.loss(z), backdoor_adjusted_loss(z, [view[:, None] for view in z], 0.3))
    assert torch.equal(task.loss(z, None, weighted), backdoor_adjusted_loss(z, weighted, 0.3))


@both
def test_the_defaults_are_the_releases(task_class):
    task = task_class(8)
    assert (task.temperature, task.tau_plus, len(task.bank), task.projection_dim) == (0.5, 0.1, 0, 128)


@both
def test_strata(double, task_class):
    task, z = task_class(8, **SMALL), projections()
    unweighted = [view[:, None].expand(-1, 4, -1) for view in z]
    torch.testing.assert_close(task.loss(z, None, unweighted), task.loss(z))

    weights = torch.rand(6, 4, 5, requires_grad=True)
    z = [view.requires_grad_() for view in z]
    adjusted = task.loss(z, None, [view[:, None] * weights for view in z])
    (gradient,) = torch.autograd.grad(adjusted, weights, retain_graph=True)
    first = torch.autograd.grad(adjusted, z, create_graph=True)
    (mixed,) = torch.autograd.grad(sum((g * torch.randn(6, 5)).sum() for g in first), weights)
    assert (gradient.abs().sum(dim=(0, 2)) > 0).all()  # of every stratum
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


@both
def test_the_queue_takes_in_a_batch_once_and_the_loss_changes_nothing(task_class):
    task, z = task_class(8, **SMALL, bank_size=20), projections()
    before = copy.deepcopy(task.state_dict())
    task.loss(z)
    task.loss(z, None, [view[:, None] for view in z])
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task.after_batch(z, None)
    torch.testing.assert_close(task.bank.entries[:12], torch.nn.functional.normalize(torch.cat(z), dim=1))
    assert task.bank.position == 12


@both
@pytest.mark.parametrize("bank_size", [0, 7])
def test_one_image_has_no_negatives(task_class, bank_size):
    with pytest.raises(ValueError, match="2 images or more"):
        task_class(8, **SMALL, bank_size=bank_size).loss(projections(images=1))


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tau_plus": 1.0}, r"tau_plus must be in \[0, 1\), got 1.0"),
        ({"tau_plus": -0.1}, r"tau_plus must be in \[0, 1\)"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"proj_layers": 0}, "proj_layers must be >= 1"),
        ({"bank_size": -1}, "bank_size must be an integer >= 0"),
    ],
)
def test_wrong_settings(task_class, settings, message):
    with pytest.raises(UserError, match=f"method_kwargs.task_kwargs.{message}"):
        task_class(8, **settings)
