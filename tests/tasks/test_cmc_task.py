import pytest
import torch
import torch.nn.functional as F

from metamask_plugin.errors import UserError
from metamask_plugin.losses.cmc import cmc_loss
from metamask_plugin.methods.interventional import InterventionalTask
from metamask_plugin.tasks.cmc import CMC


@pytest.fixture
def task(double):
    torch.manual_seed(0)
    return CMC(8, proj_hidden_dim=12, proj_output_dim=5, temperature=0.3, bank_size=16, shared_head=False)


def features():
    return [torch.randn(6, 8) for _ in range(2)]


def entries(task):
    return [bank.entries for bank in task.banks]


def test_each_view_has_a_head_and_a_bank(task):
    feats = features()
    z = [head(h) for head, h in zip(task.projector, feats)]
    torch.testing.assert_close(task(feats).loss, cmc_loss(z, 0.3, entries(task)))
    assert [tuple(bank.shape) for bank in entries(task)] == [(16, 5), (16, 5)]
    assert (task([feats[1], feats[0]]).loss - task(feats).loss).abs() > 1e-3  # the heads differ


def test_what_is_of_no_view_goes_through_the_first_head(task):
    h = features()[0]
    assert torch.equal(task.project(h), task.projector[0](h))
    assert torch.equal(task.project_key(h, 1), task.projector[1](h))


@pytest.mark.parametrize("views", [1, 3])
def test_any_number_of_views_but_two_is_the_users_error(task, views):
    with pytest.raises(UserError, match=f"must be 2 for the task cmc.*got {views}"):
        task([torch.randn(6, 8) for _ in range(views)])


def test_weighted_positives_go_through_their_own_views_head(task):
    feats, weights = features(), torch.rand(6, 3, 8)
    contrast, adjusted = InterventionalTask(task, "features")(feats, weights)
    z = [head(h) for head, h in zip(task.projector, feats)]
    strata = [
        torch.stack([head(h * a) for a in weights.unbind(1)], dim=1) for head, h in zip(task.projector, feats)
    ]
    torch.testing.assert_close(contrast.loss, cmc_loss(z, 0.3, entries(task)))
    torch.testing.assert_close(adjusted, cmc_loss(z, 0.3, entries(task), strata))


def test_strata_that_weigh_nothing_give_the_loss_itself(task):
    _, z, _ = task(features(), None)
    weighted = [view[:, None].repeat(1, 3, 1) for view in z]
    torch.testing.assert_close(task.loss(z, None, weighted), task.loss(z))


def test_every_stratum_counts_and_has_a_mixed_second_derivative(task):
    weights = torch.rand(6, 3, 8, requires_grad=True)
    _, adjusted = InterventionalTask(task, "features")(features(), weights)
    parameters = list(task.parameters())
    inner = torch.autograd.grad(adjusted, parameters, create_graph=True)
    (first,) = torch.autograd.grad(adjusted, weights, retain_graph=True)
    assert (first.abs().sum(dim=(0, 2)) > 0).all()
    (mixed,) = torch.autograd.grad(sum(g.pow(2).sum() for g in inner), weights)
    assert (mixed.abs().sum(dim=(0, 2)) > 0).all()


def test_only_after_batch_changes_the_state(task):
    _, z, _ = task(features(), None)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    task.loss(z)
    task.loss(z, None, [view[:, None] for view in z])
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    task.after_batch(z, None)
    for bank, view in zip(task.banks, z):
        torch.testing.assert_close(bank.entries[:6], F.normalize(view.detach(), dim=1))
        assert bank.position == 6
    changed = {name for name, value in task.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"banks.{view}.{part}" for view in (0, 1) for part in ("entries", "position")}


def test_without_a_bank_the_batch_alone_is_contrasted(double):
    task = CMC(8, proj_hidden_dim=12, proj_output_dim=5, bank_size=0).eval()
    _, z, _ = task(features(), None)
    torch.testing.assert_close(task.loss(z), cmc_loss(z, 0.07))
    task.after_batch(z, None)
    with pytest.raises(ValueError, match="needs a negative"):
        task([h[:1] for h in features()])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"temperature": 0}, "task_kwargs.temperature must be > 0"),
        ({"bank_size": -1}, "task_kwargs.bank_size must be an integer >= 0"),
        ({"bank_size": 0.5}, "task_kwargs.bank_size must be an integer >= 0"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(UserError, match=message):
        CMC(8, 12, 5, **kwargs)


def test_one_head_for_both_views_unless_asked_otherwise(double):
    task = CMC(8, proj_hidden_dim=12, proj_output_dim=5, bank_size=4).eval()
    assert len(task.projector) == 1 and len(task.banks) == 2
    h = torch.randn(6, 8)
    first, second = task([h, h]).projections
    assert torch.equal(first, second)
    views = [torch.randn(6, 8) for _ in range(2)]
    task.banks[1].load_state_dict(task.banks[0].state_dict())
    torch.testing.assert_close(task(views).loss, task(views[::-1]).loss)
