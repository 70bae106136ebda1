"""What holds for every task under every method: exact meta-gradients, and side effects once an iteration."""

import copy

import pytest
import torch
from method_config import TASK_KWARGS, baseline_config, icl_msr_config, method_config, task_settings
from method_training import train

from metamask_plugin.bilevel import Exact, InnerStep, PlainStep, Unrolled
from metamask_plugin.methods import ICLMSR, Baseline, MetaMask
from metamask_plugin.tasks import TASKS, MomentumTask, Task, build_task

TRIAL = InnerStep(PlainStep(0.05), PlainStep(0.05))
METHODS = {
    "baseline": (Baseline, baseline_config),
    "metamask": (MetaMask, method_config),
    "icl_msr": (ICLMSR, icl_msr_config),
}


def build(method, task, **overrides):
    torch.manual_seed(0)
    constructor, config = METHODS[method]
    return constructor(config(**task_settings(task), **overrides))


def warmed_up(model, batch=8):
    """Queues and target network off their start, as some iterations leave them."""
    views = [torch.randn(batch, 3, 32, 32) for _ in range(2)]
    for _ in range(2):
        feats = [model.backbone(x) for x in views]
        model.task.after_batch(*model.task(feats, model.target_features(views))[1:])
        for parameter in model.backbone.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter)
        model.task.after_step(model.backbone, 0.5)
    return model


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(value, second[name]) for name, value in first.items()
    )


def snapshot(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def relative_error(problem):
    oracle, exact = (estimator().gradient(problem, TRIAL) for estimator in (Unrolled, Exact))
    truth = oracle.outer_params[0]
    assert truth.norm() > 0 and torch.isfinite(truth).all()
    assert exact.outer_loss.item() == pytest.approx(oracle.outer_loss.item(), rel=1e-9)
    return ((exact.outer_params[0] - truth).norm() / truth.norm()).item()


def test_every_registered_task_is_tested_here():
    assert set(TASK_KWARGS) == set(TASKS)
    for name, task in TASKS.items():
        assert task.source and task.negatives, name


@pytest.mark.parametrize("task", TASKS)
def test_metamask_exact_equals_unrolled(double, task):
    model = warmed_up(build("metamask", task))
    model.mask.weight.data += 0.3 * torch.randn_like(model.mask.weight)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    before, rng = snapshot(model), torch.get_rng_state()
    assert relative_error(model.meta_problem(views)) < 1e-9
    assert same(model.state_dict(), before)  # a meta step leaves queues, statistics and targets
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("level", ["features", "projection"])
@pytest.mark.parametrize("task", TASKS)
def test_icl_msr_exact_equals_unrolled(double, task, level):
    model = warmed_up(build("icl_msr", task, method_kwargs__level=level, method_kwargs__gamma=0.0))
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    weights = torch.sigmoid(2 * torch.randn(8, 3, model.regularizer.channels))
    before = snapshot(model)
    assert relative_error(model.meta_problem(views, weights)) < 1e-9  # gamma 0: second order alone
    assert same(model.state_dict(), before)


class Spy:
    """Records the state that each of an iteration's stages meets."""

    def __init__(self, model):
        self.model, self.stages = model, []
        for name in ("regular_loss", "meta_stage"):
            self._watch(model, name)
        for name in ("after_batch", "after_step"):
            self._watch(model.task, name)

    def _watch(self, owner, name):
        original = getattr(owner, name)

        def recorded(*args, **kwargs):
            self.stages.append((name, self.state()))
            return original(*args, **kwargs)

        setattr(owner, name, recorded)

    def state(self):
        """What is to change once an iteration: all of the task that is not trained, but BatchNorm's own."""
        return {
            name: value.clone()
            for name, value in self.model.task.state_dict().items()
            if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
            and not dict(self.model.task.named_parameters()).get(name, torch.empty(0)).requires_grad
        }


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", TASKS)
def test_side_effects_happen_once_an_iteration(task, method):
    model = build(method, task)
    spy = Spy(model)
    start = copy.deepcopy(model.state_dict())
    trainer = train(model, steps=2, original=method == "icl_msr")
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    assert [name for name, _ in spy.stages] == ["regular_loss", "meta_stage", "after_batch", "after_step"] * 2
    for first in (0, 4):  # the meta step, and its end, see what the regular loss saw
        assert same(spy.stages[first][1], spy.stages[first + 1][1])
        assert same(spy.stages[first][1], spy.stages[first + 2][1])
    assert same({}, spy.state()) or not same(spy.stages[0][1], spy.stages[4][1])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert any(name.startswith("backbone.") for name in moved)
    if method == "metamask":
        assert "mask.weight" in moved
    if method == "icl_msr":
        assert any(name.startswith("regularizer.") for name in moved)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if issubclass(task, MomentumTask)])
def test_the_target_network_is_neither_trained_nor_left_behind(task):
    model = build("metamask", task)
    target = {f"task.target.{name}" for name, _ in model.task.target.named_parameters()}
    trained = {id(p) for group in model.learnable_params for p in group["params"]}
    assert not any(id(p) in trained for name, p in model.named_parameters() if name in target)
    start = copy.deepcopy(model.state_dict())
    train(model, steps=2)
    assert any(not torch.equal(model.state_dict()[name], start[name]) for name in target)
    assert all(p.grad is None for name, p in model.named_parameters() if name in target)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if issubclass(task, MomentumTask)])
def test_targets_are_masked_under_a_stop_gradient(task):
    model = build("metamask", task)
    model.mask.weight.data += 0.3 * torch.randn_like(model.mask.weight)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    out = {"feats": [model.backbone(x) for x in views]}
    target_feats = model.target_features(views)
    targets = model.regular_loss(out, target_feats).targets
    assert not any(z.requires_grad for z in targets)
    expected = [model.task.target.head(h * model.mask.values()) for h in target_feats]
    for z, masked in zip(targets, expected):
        torch.testing.assert_close(z, masked)


@pytest.mark.parametrize("task", TASKS)
def test_a_batch_in_another_order_has_the_same_loss(double, task):
    model = warmed_up(build("baseline", task)).task
    feats = [torch.randn(8, 256) for _ in range(2)]
    target_feats = [torch.randn(8, 256) for _ in range(2)] if model.target else None
    order = torch.randperm(8)
    shuffled = [[h[order] for h in views] for views in (feats, target_feats or [])]
    torch.testing.assert_close(model(shuffled[0], shuffled[1] or None).loss, model(feats, target_feats).loss)


@pytest.mark.parametrize("task", TASKS)
def test_the_loss_changes_nothing_in_the_task(task):
    model = warmed_up(build("baseline", task)).task.eval()  # in training BatchNorm's statistics move
    feats = [torch.randn(8, 256) for _ in range(2)]
    target_feats = feats if model.target else None
    before = copy.deepcopy(model.state_dict())
    loss, projections, targets = model(feats, target_feats)
    assert torch.equal(loss, model(feats, target_feats).loss)
    model.loss(projections, targets, [torch.randn(8, 3, z.shape[1]) for z in targets or projections])
    assert same(model.state_dict(), before)


@pytest.mark.parametrize("task", TASKS)
def test_the_strata_do_not_enter_batchnorms_statistics(task):
    images = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    statistics = []
    for lamb in (1.0, 0.0):
        model = build("icl_msr", task, method_kwargs__lamb=lamb)
        feats = [torch.full((8, 256), 0.1).add(x.flatten(1)[:, :256].abs()) for x in images]
        target_feats = model.target_features(images)
        model.regular_loss({"feats": feats}, target_feats, torch.randn(8, 3, 36, 36))
        state = model.task.state_dict()
        statistics.append({name: value for name, value in state.items() if "running_" in name})
    assert statistics[0] and same(*statistics)


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_setting_is_one_line(task):
    from metamask_plugin.errors import UserError

    with pytest.raises(UserError, match=f"do not fit the task '{task}'"):
        build_task(task, 8, {"no_such_setting": 1})


def test_gradient_accumulation_moves_the_target_once_an_optimiser_step():
    """Queues take every batch; what follows the weights waits for them."""

    class Counting(Task):
        source, projection_dim = "-", 256

        def __init__(self):
            super().__init__(256)
            self.calls = []
            self.head = torch.nn.Linear(256, 4)

        def project(self, feats, view=0):
            return self.head(feats)

        def loss(self, projections, targets=None):
            return projections[0].pow(2).mean()

        def after_batch(self, projections, targets):
            self.calls.append("batch")

        def after_step(self, backbone, progress):
            self.calls.append(progress)

    model = build("baseline", "simclr", accumulate_grad_batches=2)
    model.task = Counting()
    train(model, steps=4, accumulate_grad_batches=2)  # 24 images: 3 batches of 8
    assert model.task.calls == ["batch", "batch", 0.5, "batch", 1.0]
