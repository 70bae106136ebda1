"""MetaMask inside a Trainer: what each step changes, and what it leaves."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from method_config import method_config
from method_training import train

from metamask_plugin.errors import UserError
from metamask_plugin.methods import MetaMask


def build(**overrides):
    torch.manual_seed(0)
    return MetaMask(method_config(**overrides))


def test_both_levels_move():
    model = build()
    start = copy.deepcopy(model.state_dict())
    trainer = train(model)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    assert "mask.weight" in moved
    assert any(name.startswith("backbone.") for name in moved)
    assert any(name.startswith("task.projector") for name in moved)
    assert any(name.startswith("redundancy_head.") for name in moved)
    for metric in ("train_task_loss", "train_redundancy_loss", "train_outer_loss", "mask_std"):
        assert torch.isfinite(trainer.callback_metrics[metric])


class Watch(pl.Callback):
    """Compares the model right before and right after the method's own end-of-batch hook."""

    def __init__(self):
        self.before, self.masks = {}, []

    def on_train_batch_end(self, trainer, pl_module, *args):  # runs before the module's hook
        self.before = {k: v.clone() for k, v in pl_module.state_dict().items() if not k.startswith("mask.")}
        self.masks.append(pl_module.mask.values().clone())

    def on_train_batch_start(self, trainer, pl_module, *args):
        for name, value in self.before.items():
            assert torch.equal(pl_module.state_dict()[name], value), name


def test_the_meta_step_moves_the_mask_alone_and_the_regular_step_leaves_it():
    model, watch = build(), Watch()
    train(model, callbacks=[watch])
    assert torch.equal(watch.masks[0], torch.ones(256))  # before the first meta step
    assert not torch.equal(watch.masks[1], watch.masks[0])
    assert all(p.grad is None for p in model.mask.parameters())


def test_without_meta_learning_the_mask_stays_one_for_either_preset():
    for preset in ("paper", "official"):
        model = build(method_kwargs__preset=preset, method_kwargs__meta={"enabled": False})
        train(model)
        assert torch.equal(model.mask.values(), torch.ones(256))


def test_without_meta_learning_it_is_the_regular_loss_to_the_last_bit():
    def losses(**overrides):
        seen = []

        class Collect(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, *args):
                seen.append(float(outputs["loss"]))

        train(build(**overrides), callbacks=[Collect()])
        return seen

    without = losses(method_kwargs__meta={"enabled": False})
    with_meta = losses()
    never = losses(method_kwargs__meta={"every_n_steps": 100})
    assert without == never
    assert without[0] == with_meta[0] and without[1] != with_meta[1]


def test_without_redundancy_reduction_there_is_no_second_head():
    model = build(method_kwargs__redundancy={"weight": 0.0})
    trainer = train(model)
    assert not hasattr(model, "redundancy_head")
    assert "train_redundancy_loss" not in trainer.callback_metrics


def test_the_regular_loss_is_equation_5():
    model = build(method_kwargs__alpha=3.0, method_kwargs__scale_loss=0.5)
    model.log_dict = lambda metrics, **kwargs: model.logged.update(metrics)
    model.log = lambda *args, **kwargs: None
    model.logged = {}
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    loss = model.training_step([torch.arange(8), views, torch.arange(8)], 0)
    logged = {**model.logged, **model.step.metrics}
    regular = 0.5 * (logged["train_redundancy_loss"] + 3.0 * logged["train_task_loss"])
    torch.testing.assert_close(logged["train_loss"], regular)
    torch.testing.assert_close(loss, regular + logged["train_class_loss"])


def test_every_n_steps():
    model, watch = build(method_kwargs__meta={"every_n_steps": 2}), Watch()
    train(model, callbacks=[watch])
    assert torch.equal(watch.masks[1], watch.masks[0])  # after step 1: nothing yet
    assert not torch.equal(watch.masks[2], watch.masks[1])


def test_gradient_accumulation_makes_one_meta_step_an_optimiser_step():
    model, watch = build(accumulate_grad_batches=2), Watch()
    train(model, callbacks=[watch], accumulate_grad_batches=2)
    assert torch.equal(watch.masks[1], watch.masks[0])
    assert not torch.equal(watch.masks[2], watch.masks[1])


@pytest.mark.parametrize("estimator", ["exact", "unrolled", "finite_difference", "first_order"])
def test_every_estimator_trains(estimator):
    model = build(method_kwargs__meta={"estimator": estimator})
    train(model, steps=1)
    assert not torch.equal(model.mask.values(), torch.ones(256))


def test_official_preset_uses_the_optimisers_momentum_and_starts_at_one_half():
    model = build(method_kwargs__preset="official")
    assert torch.equal(model.mask.values(), torch.full((256,), 0.5))
    trainer = train(model)
    main = trainer.optimizers[0]
    steps = model.meta.inner_step(main)
    name, parameter = next(iter(model.backbone.named_parameters()))
    assert steps.encoder.momentum == 0.9 and set(steps.encoder.weight_decay.values()) == {1e-4}
    assert torch.equal(steps.encoder.buffers[name], main.state[parameter]["momentum_buffer"])
    assert model.meta.optimizer.param_groups[0]["momentum"] == 0.9
    assert model.mask.values().min() > 0 and model.mask.values().max() < 1


def test_z_is_there_in_evaluation_only():
    model = build()
    x = torch.randn(2, 3, 32, 32)
    assert "z" not in model.train()(x)
    assert model.eval()(x)["z"].shape == (2, 16)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": -1}, r"method_kwargs.alpha must be >= 0, got -1"),
        ({"scale_loss": 0}, "scale_loss must be > 0"),
        ({"preset": "papr"}, "did you mean 'paper'"),
        ({"task": "simclrr"}, "did you mean 'simclr'"),
        ({"task_kwargs": {"temprature": 1}}, "task_kwargs do not fit the task 'simclr'"),
        ({"task_kwargs": {"temperature": 0}}, "temperature must be > 0"),
        ({"alhpa": 1}, "did you mean 'alpha'"),
        ({"redundancy": {"lamb": -1}}, "redundancy.lamb must be >= 0"),
        ({"redundancy": {"form": "white"}}, "redundancy.form must be one of"),
        ({"mask": {"parameterisation": "softmax"}}, "parameterisation must be one of free, sigmoid"),
        ({"meta": {"estimator": "exakt"}}, "did you mean 'exact'"),
        ({"meta": {"estimator_kwargs": {"r": 1}}}, "estimator_kwargs do not fit"),
        ({"meta": {"trial": "adam"}}, "meta.trial must be one of"),
        ({"meta": {"every_n_steps": 0}}, "every_n_steps must be >= 1"),
        ({"meta": {"inner_lr": -0.1}}, "inner_lr must be >= 0"),
        ({"meta": {"lr": 1}}, "a key of method_kwargs.meta must be one of"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(UserError, match=message):
        build(**{f"method_kwargs__{key}": value for key, value in kwargs.items()})
