import copy

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.losses import backdoor_adjusted_loss, nt_xent_loss
from metamask_plugin.losses.distance_polarization import distance_polarization
from metamask_plugin.tasks.lmcl import LMCL
from metamask_plugin.tasks.simclr import SimCLR

SMALL = {"proj_hidden_dim": 12, "proj_output_dim": 5}


def projections(views=2, images=6):
    torch.manual_seed(0)
    return [torch.randn(images, 5) for _ in range(views)]


@pytest.mark.parametrize("views", [2, 3])
@pytest.mark.parametrize("bank_size", [0, 7])
def test_is_nt_xent_and_the_regulariser(double, views, bank_size):
    task = LMCL(8, **SMALL, delta_plus=0.1, delta_minus=0.7, lamb=3.0, temperature=0.3, bank_size=bank_size)
    z = projections(views)
    contrast = nt_xent_loss(z, 0.3, bank=task.bank.entries)
    torch.testing.assert_close(task.loss(z), contrast + 3 * distance_polarization(z, 0.1, 0.7))


def test_defaults_and_lambda_zero():
    z, task = projections(), LMCL(8)
    assert (task.delta_plus, task.delta_minus, task.lamb, task.projection_dim) == (0.2, 0.5, 10.0, 256)
    assert torch.equal(LMCL(8, lamb=0).loss(z), SimCLR(8).loss(z))


def test_one_image_has_no_negatives_but_a_distance():
    z = projections(images=1)
    torch.testing.assert_close(LMCL(8, **SMALL).loss(z), 10 * distance_polarization(z))
    with pytest.raises(ValueError, match="2 images or more"):
        LMCL(8, **SMALL).loss(z, None, [view[:, None] for view in z])


def test_strata_enter_the_contrast_alone(double):
    task, z = LMCL(8, **SMALL, bank_size=7), projections()
    unweighted = [view[:, None].expand(-1, 4, -1) for view in z]
    contrast = task.loss(z) - 10 * distance_polarization(z)
    torch.testing.assert_close(task.loss(z, None, unweighted), contrast)

    weights = torch.rand(6, 4, 5, requires_grad=True)
    z = [view.requires_grad_() for view in z]
    weighted = [view[:, None] * weights for view in z]
    adjusted = task.loss(z, None, weighted)
    torch.testing.assert_close(adjusted, backdoor_adjusted_loss(z, weighted, 0.5, task.bank.entries))
    (gradient,) = torch.autograd.grad(adjusted, weights, retain_graph=True)
    first = torch.autograd.grad(adjusted, z, create_graph=True)
    (mixed,) = torch.autograd.grad(sum((g * torch.randn(6, 5)).sum() for g in first), weights)
    assert (gradient.abs().sum(dim=(0, 2)) > 0).all()  # of every stratum
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


def test_the_queue_takes_in_a_batch_once_and_the_loss_changes_nothing():
    task, z = LMCL(8, **SMALL, bank_size=20), projections()
    before = copy.deepcopy(task.state_dict())
    task.loss(z)
    task.loss(z, None, [view[:, None] for view in z])
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task.after_batch(z, None)
    torch.testing.assert_close(task.bank.entries[:12], torch.nn.functional.normalize(torch.cat(z), dim=1))
    assert task.bank.position == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta_plus": 0.6}, r"delta_plus must be between 0 and delta_minus \(0.5\), got 0.6"),
        ({"delta_plus": -0.1}, "delta_plus must be between 0"),
        ({"delta_minus": 1.2}, "delta_minus must be <= 1"),
        ({"lamb": -1}, "lamb must be >= 0"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"bank_size": 0.5}, "bank_size must be an integer >= 0"),
    ],
)
def test_wrong_settings(settings, message):
    with pytest.raises(UserError, match=f"method_kwargs.task_kwargs.{message}"):
        LMCL(8, **settings)
