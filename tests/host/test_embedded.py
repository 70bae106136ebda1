"""What the embedded host does beyond the contract: errors, schedules, parameter groups."""

import math

import pytest
import torch
from method_config import method_config

from metamask_plugin.errors import UserError
from metamask_plugin.host.embedded import BaseMethod, topk_accuracy
from metamask_plugin.host.optimizers import (
    build_optimizer,
    build_scheduler,
    build_warmup_step,
    without_decay_on_vectors,
)


def parameters():
    return [torch.nn.Parameter(torch.randn(3, 3)), torch.nn.Parameter(torch.randn(3))]


def test_a_missing_key_is_named():
    cfg = method_config()
    del cfg.optimizer.lr
    with pytest.raises(UserError, match="optimizer.lr must be set"):
        BaseMethod(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("backbone__name", "resnet19", "did you mean 'resnet18'"),
        ("backbone__kwargs", {"depth": 3}, "backbone.kwargs do not fit"),
        ("scheduler__interval", "minute", "scheduler.interval must be one of"),
    ],
)
def test_wrong_settings(key, value, message):
    with pytest.raises(UserError, match=message):
        BaseMethod(method_config(**{key: value}))


def test_wrong_optimizer_and_scheduler():
    with pytest.raises(UserError, match="optimizer.name must be one of"):
        build_optimizer("sgdd", [{"params": parameters()}], 0.1, 0.0, {})
    with pytest.raises(UserError, match="optimizer.kwargs do not fit"):
        build_optimizer("sgd", [{"params": parameters()}], 0.1, 0.0, {"betas": 1})
    optimizer = build_optimizer("sgd", [{"params": parameters()}], 0.1, 0.0, {})
    with pytest.raises(UserError, match="scheduler.name must be one of"):
        build_scheduler("cosine", optimizer, 0, 10)
    with pytest.raises(UserError, match="lr_decay_steps must be a list"):
        build_scheduler("step", optimizer, 0, 10)


def learning_rates(scheduler, optimizer, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates)


def test_warmup_cosine_per_group_and_static_group():
    first, second, third = ([p] for p in [*parameters(), torch.nn.Parameter(torch.ones(1))])
    groups = [{"params": first}, {"params": second, "lr": 1.0}, {"params": third, "static_lr": True}]
    optimizer = build_optimizer("sgd", groups, 0.4, 0.0, {})
    scheduler = build_scheduler(
        "warmup_cosine", optimizer, warmup=4, total=12, warmup_start_lr=0.1, min_lr=0.02
    )
    rates = learning_rates(scheduler, optimizer, 13)
    torch.testing.assert_close(rates[:5, 0], torch.tensor([0.1, 0.2, 0.3, 0.4, 0.4]))
    middle = 0.02 + (0.4 - 0.02) * (1 + math.cos(math.pi * 0.5)) / 2
    assert rates[8, 0].item() == pytest.approx(middle)
    assert rates[12, 0].item() == pytest.approx(0.02) and rates[12, 1].item() == pytest.approx(0.02)
    assert rates[3, 1].item() == rates[4, 1].item() == pytest.approx(1.0)
    assert (rates[:, 2] == 0.4).all()


def test_no_warmup_starts_at_the_full_rate():
    optimizer = build_optimizer("sgd", [{"params": parameters()}], 0.4, 0.0, {})
    scheduler = build_scheduler("warmup_cosine", optimizer, warmup=0, total=10, warmup_start_lr=3e-5)
    assert learning_rates(scheduler, optimizer, 1)[0, 0].item() == pytest.approx(0.4)


def test_vectors_lose_their_weight_decay():
    groups = without_decay_on_vectors([{"name": "g", "params": parameters(), "lr": 0.3}])
    assert [len(g["params"]) for g in groups] == [1, 1]
    assert "weight_decay" not in groups[0] and groups[1]["weight_decay"] == 0.0
    assert [g["name"] for g in groups] == ["g", "g_no_decay"], "monitors want unique names"
    assert all(g["lr"] == 0.3 for g in groups)
    assert [g["name"] for g in without_decay_on_vectors(groups)] == ["g", "g_no_decay"]


def test_lars_adapts_matrices_and_leaves_vectors_when_asked():
    matrix, vector = parameters()
    before = matrix.detach().clone(), vector.detach().clone()
    optimizer = build_optimizer(
        "lars", [{"params": [matrix, vector]}], 1.0, 1e-4, {"eta": 0.02, "exclude_bias_n_norm": True}
    )
    (matrix.sum() + vector.sum()).backward()
    optimizer.step()
    decayed = torch.ones(3, 3) + 1e-4 * before[0]
    trust = 0.02 * before[0].norm() / (torch.ones(3, 3).norm() + 1e-4 * before[0].norm())
    torch.testing.assert_close(matrix.detach(), before[0] - trust * decayed, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(vector.detach(), before[1] - 1.0)


def test_lars_adapts_groups_without_weight_decay():
    """The online classifier's, as in solo-learn."""
    matrix, _ = parameters()
    before = matrix.detach().clone()
    optimizer = build_optimizer("lars", [{"params": [matrix], "weight_decay": 0.0}], 1.0, 1e-4, {"eta": 0.02})
    matrix.sum().backward()
    optimizer.step()
    torch.testing.assert_close(matrix.detach(), before - 0.02 * before.norm() / 3, rtol=1e-4, atol=1e-6)


def test_the_schedule_goes_on_from_the_state_of_another():
    optimizer = build_optimizer("sgd", [{"params": parameters()}], 0.4, 0.0, {})
    settings = {"warmup": 2, "total": 10, "warmup_start_lr": 0.1}
    straight = build_scheduler("warmup_cosine", optimizer, **settings)
    expected = learning_rates(straight, optimizer, 6)[:, 0]
    optimizer.param_groups[0]["lr"] = 0.4
    resumed = build_scheduler("warmup_cosine", optimizer, **settings)
    # what solo-learn's own schedule keeps
    state = {"last_epoch": 3, "base_lrs": [0.4], "warmup_epochs": 7, "max_epochs": 70, "get_lr": None}
    resumed.load_state_dict(state)
    resumed.step()
    torch.testing.assert_close(learning_rates(resumed, optimizer, 2)[:, 0], expected[4:])
    assert "max_epochs" not in resumed.state_dict()


def test_rates_grow_with_gradient_accumulation():
    model = BaseMethod(method_config(accumulate_grad_batches=4))
    assert model.lr == pytest.approx(0.4) and model.classifier_lr == pytest.approx(0.4)


def test_topk_accuracy_with_few_classes_and_missing_labels():
    logits = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.5]])
    assert topk_accuracy(logits, torch.tensor([0, 2]), 1).item() == 50
    assert topk_accuracy(logits, torch.tensor([0, 2]), 5).item() == 100
    assert topk_accuracy(logits, torch.tensor([-1, 1]), 1).item() == 100
    assert topk_accuracy(logits, torch.tensor([-1, -1]), 1).item() == 0


def test_warmup_step_drops_count_from_either_end_and_leave_static_groups_alone():
    parameters = [torch.nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "static_lr": True}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    # epochs of 2 steps; the drop 9 epochs before the end of 4 would lie before the start
    schedule = build_warmup_step(optimizer, 3, 2.0, 4, [-9, 2, -1], 0.5)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    expected = [1 / 3, 2 / 3, 1, 1, 0.5, 0.5, 0.25, 0.25]
    assert [rate for rate, _ in rates] == pytest.approx(expected)
    assert {rate for _, rate in rates} == {1.0}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"warmup_steps": -1}, "scheduler.warmup_steps must be a number of optimiser steps >= 0, got -1"),
        ({"decay_factor": 0.0}, r"scheduler.decay_factor must be in \(0, 1\], got 0.0"),
    ],
)
def test_warmup_step_refuses_what_cannot_be(kwargs, message):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    settings = {"warmup_steps": 1, "steps_per_epoch": 2.0, "max_epochs": 4, "lr_decay_steps": None}
    with pytest.raises(UserError, match=message):
        build_warmup_step(optimizer, **{**settings, "decay_factor": 0.5, **kwargs})
