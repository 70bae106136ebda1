"""When the meta step happens, what it is made on, and what it shares with the regular step."""

import copy
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from method_config import icl_msr_config, method_config, task_settings
from method_training import train
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.methods import ICLMSR, MetaMask
from metamask_plugin.methods.meta_step import MetaStep


def build(meta=None, task="simclr", msr=False, **overrides):
    torch.manual_seed(0)
    constructor, config = (ICLMSR, icl_msr_config) if msr else (MetaMask, method_config)
    settings = {**task_settings(task), **overrides, "method_kwargs__meta": meta or {}}
    return constructor(config(**settings))


class Gradients(pl.Callback):
    """The meta-gradients in the order in which they are made, and the weights they are made at."""

    def __init__(self, model):
        self.seen = []
        inner = model.meta.estimator.gradient

        def gradient(problem, trial):
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            result = inner(problem, trial)
            self.seen.append((problem, trial, weights, result.outer_params[0]))
            return result

        model.meta.estimator.gradient = gradient


@pytest.mark.parametrize("msr", [False, True])
@pytest.mark.parametrize("task", ["simclr", "moco", "swav", "byol"])
def test_shared_is_the_meta_gradient_at_the_weights_before_the_regular_step(task, msr):
    model = build({"when": "before_step"}, task, msr)
    start = copy.deepcopy(model.state_dict())
    gradients = Gradients(model)
    train(model, steps=1, original=msr)
    ((problem, trial, weights, shared),) = gradients.seen
    trained = [name for name, _ in model.named_parameters() if not name.startswith("task.target")]
    assert all(torch.equal(weights[name], start[name]) for name in trained)

    again = build({"when": "after_step"}, task, msr)
    batch = next(iter(_batches(msr)))
    views, original = again.separate(batch[1])
    arguments = (views, again.regularizer(original).detach()) if msr else (views,)
    expected = again.meta.estimator.gradient(again.meta_problem(*arguments), trial).outer_params[0]
    # (moco's and byol's targets, in training mode, see the same batch statistics)
    torch.testing.assert_close(shared, expected, rtol=2e-3, atol=2e-3 * expected.abs().max().item())


def _batches(original):
    from method_training import Views
    from torch.utils.data import DataLoader

    return DataLoader(Views(original=original), batch_size=8)


def test_shared_spares_the_encoder_a_forward_pass():
    def calls(when):
        model, count = build({"when": when}), []
        model.backbone.register_forward_hook(lambda *args: count.append(1))
        train(model, steps=1)
        return len(count)

    # two views each: regular, outer, forward mode; and the inner pass where it is not shared
    assert calls("before_step") == 2 * 3 and calls("after_step") == 2 * 4


def test_shared_moves_the_mask_before_the_regular_step_of_the_same_batch():
    model = build({"when": "before_step"})
    seen = []
    regular = model.regular_loss
    model.regular_loss = lambda *args: (seen.append(model.mask.values().clone()), regular(*args))[1]
    train(model, steps=2)
    assert not torch.equal(seen[0], torch.ones(256)) and not torch.equal(seen[1], seen[0])
    assert torch.equal(model.mask.values(), seen[1])


def test_shared_leaves_the_regular_step_as_it_is():
    def weights(meta):
        model = build(meta)
        train(model)
        return {name: value for name, value in model.state_dict().items() if name != "mask.weight"}

    # a mask that does not move: then the shared meta step changes nothing at all
    still = {"optimizer": {"name": "sgd", "lr": 1e-30, "weight_decay": 0.0, "kwargs": {}}}
    shared, without = weights({**still, "when": "before_step"}), weights({"enabled": False})
    assert all(torch.equal(value, without[name]) for name, value in shared.items())


def test_every_second_step_and_accumulation():
    for kwargs, steps in (({"every_n_steps": 2}, 1), ({}, 2)):
        accumulate = 2 if not kwargs else 1
        model = build({"when": "before_step", **kwargs}, accumulate_grad_batches=accumulate)
        masks = []
        regular = model.regular_loss
        model.regular_loss = lambda *args: (masks.append(model.mask.values().clone()), regular(*args))[1]  # noqa: B023
        train(model, steps=3, accumulate_grad_batches=accumulate)
        moved = [not torch.equal(a, b) for a, b in zip([torch.ones(256), *masks], masks)]
        # accumulating two batches, the epoch's last one steps as well
        assert moved == ([False, True, False] if kwargs else [False, True, True]), steps


@pytest.mark.parametrize("when", ["after_step", "before_step"])
def test_clipping_reaches_the_regular_step_alone(when):
    model = build({"when": when}, optimizer__weight_decay=0.0, optimizer__kwargs={"momentum": 0.0})
    start = copy.deepcopy(model.state_dict())
    train(model, steps=1, gradient_clip_val=1e-6)
    shift = max((p - start[name]).abs().max() for name, p in model.named_parameters() if p.requires_grad)
    assert shift < 1e-6
    assert (model.mask.values() - 1).abs().max() > 1e-3


@pytest.mark.parametrize("when", ["after_step", "before_step", "epoch_end"])
@pytest.mark.parametrize("msr", [False, True])
def test_under_mixed_precision(when, msr):
    model = build({"when": when}, msr=msr)
    gradients = Gradients(model)
    train(model, steps=2, original=msr, precision="bf16-mixed")
    assert len(gradients.seen) == 2
    for *_, gradient in gradients.seen:
        assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.norm() > 0


def test_the_meta_step_of_a_mixed_precision_run_is_in_full_precision():
    model = build()
    gradients = Gradients(model)
    train(model, steps=1, precision="bf16-mixed")
    ((problem, trial, _, gradient),) = gradients.seen
    problem.encode_once(problem.encoder_params)  # outside autocast, what it was
    again = build()
    again.load_state_dict(gradients.seen[0][2])
    views, _ = again.separate(next(iter(_batches(False)))[1])
    expected = again.meta.estimator.gradient(again.meta_problem(views), trial).outer_params[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("task", ["simclr", "moco", "byol"])
def test_half_of_the_batch(task):
    model = build({"batch_share": 0.5}, task)
    gradients = Gradients(model)
    train(model, steps=1)
    ((problem, *_),) = gradients.seen
    assert problem.encode(problem.encoder_params).shape[:2] == (2, 4)


@pytest.mark.parametrize("when", ["after_step", "before_step"])
def test_a_trial_step_on_the_heads_alone(when):
    model = build({"trial_on": "heads", "when": when})
    calls = []
    model.backbone.register_forward_hook(lambda *args: calls.append(1))
    train(model, steps=1)
    assert len(calls) == (2 if when == "before_step" else 4)  # the regular step's, and one more
    assert not torch.equal(model.mask.values(), torch.ones(256))


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"when": "before"}, "meta.when"),
        ({"trial_on": "encoder"}, "meta.trial_on"),
        ({"precision": "fp16"}, "meta.precision"),
        ({"batch_share": 0.0}, r"meta.batch_share must be in \(0, 1\], got 0.0"),
        ({"batch_share": 0.5, "when": "before_step"}, "meta.batch_share must be 1 with when=before_step"),
        ({"estimator": "unrolled", "when": "before_step"}, "meta.estimator must be another than unrolled"),
        (
            {"estimator": "unrolled", "precision": "bf16"},
            "meta.precision must be full with estimator=unrolled",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(meta, message):
    with pytest.raises(UserError, match=message):
        build(meta)


def test_what_cannot_be_shared():
    with pytest.raises(UserError, match="level must be features or projection with meta.when=before_step"):
        build({"when": "before_step"}, msr=True, method_kwargs__level="feature_map")
    model = build({"when": "before_step"})
    model.backbone.layers.append(nn.Dropout(0.1))
    with pytest.raises(
        UserError, match="meta.when must be after_step or epoch_end with an encoder that draws"
    ):
        train(model, steps=1)


@pytest.mark.parametrize("trial", ["plain", "momentum"])
@pytest.mark.parametrize("msr", [False, True])
@pytest.mark.parametrize("task", ["simclr", "moco", "byol"])
def test_a_captured_meta_step_reads_all_that_changes(monkeypatch, graph_stand_in, task, msr, trial):
    """Weights, queues, targets, momentum and the trial step's length, through the same places each time."""

    def trained(captured):
        monkeypatch.setattr(MetaStep, "can_capture", lambda self, method: captured)
        model = build({"trial": trial}, task, msr, scheduler__name="warmup_cosine", max_epochs=3)
        train(model, 3, original=msr, max_epochs=3)
        return model.state_dict()

    plain = trained(False)
    for name, value in trained(True).items():
        assert torch.equal(value, plain[name]), name


@pytest.mark.parametrize(
    ("asked", "device", "world_size", "task", "captures"),
    [
        (True, "cuda", 1, "simclr", True),
        (False, "cuda", 1, "simclr", False),
        (True, "cpu", 1, "simclr", False),
        (True, "cuda", 2, "simclr", False),
        (True, "cuda", 1, "swav", False),
        (True, "cuda", 1, "wmse", False),
    ],
)
def test_who_captures(monkeypatch, asked, device, world_size, task, captures):
    model = build(None, task, performance={"cuda_graph": asked})
    monkeypatch.setattr(MetaMask, "device", torch.device(device))
    model._trainer = SimpleNamespace(world_size=world_size)
    assert model.meta.can_capture(model) == captures
