"""NaN and infinity, wherever they come from: the run stops or leaves the step out; nothing is spoilt."""

import json
import math

import lightning.pytorch as pl
import pytest
import torch
from killed_runs import assert_same, config, read, rows, run_folder
from lightning.pytorch.plugins import MixedPrecision
from method_config import icl_msr_config, method_config, task_settings
from method_training import spoil_the_classifier, train

from metamask_plugin.bilevel import Exact
from metamask_plugin.cli import pretrain
from metamask_plugin.data import PretrainDataModule
from metamask_plugin.errors import NonFiniteError
from metamask_plugin.methods import METHODS
from metamask_plugin.methods.base import TaskMethod
from metamask_plugin.methods.numeric_guard import NumericGuard
from metamask_plugin.modules.dimensional_mask import DimensionalMask
from metamask_plugin.tasks import SimCLR

STEP = 6
"""Optimiser steps made before the one that is spoilt: it is the third of the second epoch."""


def at_step(method, then, otherwise):
    return then if method._trainer is not None and method.trainer.global_step == STEP else otherwise


def in_the_loss(value):
    def inject(patch):
        plain = TaskMethod.training_step

        def training_step(self, batch, batch_idx):
            self.task.spoil = self.trainer.global_step == STEP
            return plain(self, batch, batch_idx)

        loss = SimCLR.loss
        patch.setattr(TaskMethod, "training_step", training_step)
        patch.setattr(
            SimCLR,
            "loss",
            lambda self, *args: loss(self, *args) * (value if getattr(self, "spoil", False) else 1.0),
        )

    return inject


def in_a_gradient(value):
    def inject(patch):
        plain = TaskMethod.on_after_backward

        def on_after_backward(self):
            plain(self)
            if self.trainer.global_step == STEP:
                next(self.backbone.parameters()).grad[0] = value

        patch.setattr(TaskMethod, "on_after_backward", on_after_backward)

    return inject


def in_a_pixel(patch):
    plain = PretrainDataModule.on_after_batch_transfer

    def on_after_batch_transfer(self, batch, dataloader_idx):
        batch = plain(self, batch, dataloader_idx)
        if self.trainer.training and self.trainer.global_step == STEP:
            batch[1][1][3, 0, 5, 5] = math.nan
        return batch

    patch.setattr(PretrainDataModule, "on_after_batch_transfer", on_after_batch_transfer)


def in_the_meta_gradient(patch):
    plain = Exact.gradient

    def gradient(self, problem, trial):
        found = plain(self, problem, trial)
        self.made = getattr(self, "made", 0) + 1
        if self.made == STEP + 1:
            found.outer_params[0][2] = math.nan
        return found

    patch.setattr(Exact, "gradient", gradient)


FAULTS = {
    "NaN loss": (in_the_loss(math.nan), "train_task_loss = nan"),
    "infinite loss": (in_the_loss(math.inf), "train_task_loss = inf"),
    "NaN gradient": (in_a_gradient(math.nan), "the gradient of backbone."),
    "infinite gradient": (in_a_gradient(math.inf), "the gradient of backbone."),
    "NaN pixel": (in_a_pixel, "with pixels that are not in view 1; look at the images"),
    "NaN meta-gradient": (in_the_meta_gradient, "the gradient of meta parameter 0"),
}
EACH_STEP = "method_kwargs.meta.every_n_steps=1"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same training without a fault."""
    return pretrain.run(config(tmp_path_factory.mktemp("whole"), EACH_STEP)).path


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("fault", FAULTS)
def test_the_run_stops_at_that_step_and_goes_on_from_before(tmp_path, whole, monkeypatch, capsys, fault):
    inject, message = FAULTS[fault]
    cfg = config(tmp_path, EACH_STEP, "++checkpoint.every_n_steps=1")
    with monkeypatch.context() as patch:
        inject(patch)
        with pytest.raises(SystemExit) as stop:
            pretrain.run(cfg.copy())
    out = capsys.readouterr()
    (line,) = [line for line in out.err.splitlines() if line.startswith("error:")]
    assert stop.value.code == 2 and message in line and "in epoch 2, step" in line
    folder = run_folder(tmp_path)
    seen = json.loads((folder / "nonfinite.json").read_text())
    assert len(set(seen["indexes"])) == 32 or "meta" in fault
    assert seen["epoch"] == 1 and seen["nonfinite"] | seen["nonfinite_gradients"]

    before, at_fault = read(folder / "last.ckpt"), read(folder / "nonfinite.ckpt")
    assert before["global_step"] == STEP
    if "meta" not in fault:  # there the regular step has been made
        for name, value in before["state_dict"].items():
            if "running_" not in name and "num_batches" not in name:
                assert torch.equal(at_fault["state_dict"][name], value), name
    assert_same(at_fault["state_dict"]["mask.weight"], before["state_dict"]["mask.weight"])

    resumed = pretrain.run(cfg.copy()).path  # the fault is gone: as if it had never been
    assert_same(read(resumed / "last.ckpt")["state_dict"], read(whole / "last.ckpt")["state_dict"])
    assert rows(resumed) == rows(whole)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("fault", ["NaN loss", "infinite gradient", "NaN meta-gradient"])
def test_where_answers_are_read_a_look_later_no_checkpoint_has_the_step(
    tmp_path, whole, monkeypatch, capsys, fault
):
    inject, message = FAULTS[fault]
    cfg = config(tmp_path, EACH_STEP, "++checkpoint.every_n_steps=1")
    with monkeypatch.context() as patch:
        inject(patch)
        patch.setattr(NumericGuard, "_deferred", lambda self, method: True)  # as on a GPU
        with pytest.raises(SystemExit):
            pretrain.run(cfg.copy())
    out = capsys.readouterr()
    (line,) = [line for line in out.err.splitlines() if line.startswith("error:")]
    assert message in line and "in epoch 2, step" in line
    seen = json.loads((run_folder(tmp_path) / "nonfinite.json").read_text())
    assert seen["epoch"] == 1 and (len(set(seen["indexes"])) == 32 or "meta" in fault)
    resumed = pretrain.run(cfg.copy()).path
    assert_same(read(resumed / "last.ckpt")["state_dict"], read(whole / "last.ckpt")["state_dict"])


@pytest.mark.fault("numbers")
def test_the_last_answer_is_read_where_a_training_ends_inside_an_epoch(monkeypatch):
    monkeypatch.setattr(NumericGuard, "_deferred", lambda self, method: True)
    spoil_the_classifier(monkeypatch)
    with pytest.raises(NonFiniteError, match="the gradient of classifier.weight in epoch 1, step 1"):
        train(METHODS["metamask"](method_config()), steps=3, max_steps=2)


@pytest.mark.fault("numbers")
def test_under_a_gradient_scaler_the_first_culprit_is_named(monkeypatch):
    monkeypatch.setattr(NumericGuard, "_deferred", lambda self, method: True)
    plain = Exact.gradient

    def gradient(self, problem, trial):
        found = plain(self, problem, trial)
        found.outer_params[0][2] = math.nan
        return found

    monkeypatch.setattr(Exact, "gradient", gradient)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0))
    model = METHODS["metamask"](method_config(backbone__kwargs={"width": 8}))
    with pytest.raises(NonFiniteError, match="the gradient of meta parameter 0 in epoch 1, step 1"):
        train(model, 3, plugins=[precision])


class Snapshots(pl.Callback):
    """Everything that a step may change, before each step and after the last."""

    def __init__(self):
        self.states = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.states.append({name: value.clone() for name, value in pl_module.state_dict().items()})

    def on_train_end(self, trainer, pl_module):
        self.on_train_batch_start(trainer, pl_module, None, None)

    def changed_in(self, step):
        before, after = self.states[step], self.states[step + 1]
        return {name for name, value in after.items() if not torch.equal(value, before[name])}


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("task", ["simclr", "moco", "swav", "byol"])
@pytest.mark.parametrize("build", [method_config, icl_msr_config])
def test_a_step_that_is_left_out_changes_nothing(monkeypatch, capsys, build, task):
    cfg = build(**task_settings(task), numerics={"on_nonfinite": "skip", "max_skipped_steps": 1})
    model, seen = METHODS[cfg.method](cfg), Snapshots()
    spoil_the_classifier(monkeypatch)
    trainer = train(model, steps=3, callbacks=[seen], original=build is icl_msr_config)
    assert seen.changed_in(1) == set()
    assert {"classifier.weight"} < seen.changed_in(0) and "classifier.weight" in seen.changed_in(2)
    assert model.guard.skipped == 1 and trainer.global_step == 3
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())
    assert (
        "warning: step left out (1 of at most 1): the gradient of classifier.weight"
        in capsys.readouterr().out
    )


@pytest.mark.fault("numbers")
def test_one_step_too_many_stops(monkeypatch):
    plain = TaskMethod.on_after_backward

    def on_after_backward(self):
        plain(self)
        self.classifier.weight.grad[0, 0] = math.nan

    monkeypatch.setattr(TaskMethod, "on_after_backward", on_after_backward)
    model = METHODS["metamask"](method_config(numerics={"on_nonfinite": "skip", "max_skipped_steps": 2}))
    with pytest.raises(NonFiniteError, match="2 steps were left out before"):
        train(model, steps=3)


@pytest.mark.fault("numbers")
def test_a_mask_that_is_no_number_stops_the_run():
    class Spoilt(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            pl_module.mask.weight[3] = math.inf

    with pytest.raises(NonFiniteError, match=r"train_task_loss = nan.* in epoch 1, step 0"):
        train(METHODS["metamask"](method_config()), callbacks=[Spoilt()])


@pytest.mark.fault("numbers")
def test_a_sigmoid_stays_inside_its_domain():
    mask = DimensionalMask(3, "sigmoid")
    optimizer = torch.optim.SGD(mask.parameters(), lr=1e6)
    for gradient in (torch.tensor([1.0, -1.0, 0.0]), torch.tensor([-1.0, 1.0, 0.0])):
        before = mask.logit.clone()
        mask.accumulate(gradient)
        optimizer.step()
        mask.confine()
        assert ((mask.values() > 0) & (mask.values() < 1)).all()
        assert (mask.logit != before).tolist() == [True, True, False]  # and it comes back


class Overflowing(torch.amp.GradScaler):
    """A scale at which the third step's gradients overflow in float16."""

    def scale(self, outputs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().scale(outputs) * (math.inf if self.calls == 3 else 1.0)


@pytest.mark.fault("numbers")
@pytest.mark.parametrize("build", [method_config, icl_msr_config])
def test_an_overflow_under_the_gradient_scaler_skips_the_meta_step_too(build):
    cfg = build(**task_settings("moco"), backbone__kwargs={"width": 8})
    model, seen = METHODS[cfg.method](cfg), Snapshots()
    scaler = Overflowing("cpu", init_scale=2.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    train(model, 3, [seen], build is icl_msr_config, max_epochs=2, plugins=[precision])
    assert scaler.calls == 6 and scaler.get_scale() == 1.0  # halved once, by the scaler itself
    meta = "mask.weight" if build is method_config else "regularizer.to_weights.weight"
    learnt = {name for name in seen.changed_in(1) if "running_" not in name and "num_batches" not in name}
    assert meta in learnt and meta in seen.changed_in(3)
    assert not seen.changed_in(2) & learnt
    assert model.guard.skipped == 0


@pytest.mark.fault("numbers")
def test_a_collapse_is_said(capsys):
    class Constant(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            for parameter in pl_module.backbone.parameters():
                parameter.data.zero_()
            for name, parameter in pl_module.backbone.named_parameters():
                if name.endswith("bias"):
                    parameter.data.fill_(1.0)

    train(METHODS["metamask"](method_config()), callbacks=[Constant()])
    out = capsys.readouterr().out
    assert (
        out.count("warning: the features have collapsed in epoch 1") == 1 and "numerics.collapse_below" in out
    )


def test_a_healthy_run_says_nothing(capsys, whole):
    assert all(float(row["feature_std"]) > 0.05 for row in rows(whole))
    train(METHODS["metamask"](method_config()))
    assert "warning" not in capsys.readouterr().out
