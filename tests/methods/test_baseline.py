"""A task alone: the baseline that any config of MetaMask or ICL-MSR turns into."""

import lightning.pytorch as pl
import pytest
import torch
from method_config import baseline_config, icl_msr_config, method_config, task_settings
from method_training import train

from metamask_plugin.errors import UserError
from metamask_plugin.methods import ICLMSR, Baseline, MetaMask

NO_META = {"method_kwargs__meta": {"enabled": False}}


def build(config=baseline_config, **overrides):
    torch.manual_seed(0)
    return Baseline(config(**overrides))


def losses(model, **kwargs):
    seen = []

    class Collect(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, *args):
            seen.append(float(outputs["loss"]))

    train(model, callbacks=[Collect()], **kwargs)
    return seen


@pytest.mark.parametrize("config", [method_config, icl_msr_config])
def test_any_config_of_a_method_trains_its_task_alone(config):
    model = build(config, method="baseline")
    assert not hasattr(model, "mask") and not hasattr(model, "regularizer")
    original = config is icl_msr_config
    assert losses(model, original=original) == losses(build())  # the un-augmented view is left aside


def test_it_is_metamask_without_mask_and_redundancy_reduction():
    torch.manual_seed(0)
    kwargs = {"method_kwargs__redundancy": {"weight": 0.0}, "method_kwargs__alpha": 3.0}
    plugin = MetaMask(method_config(**NO_META, **kwargs))
    assert losses(plugin) == losses(build(method_config, method="baseline", **kwargs))


def test_barlow_twins_alone_is_metamasks_redundancy_term():
    small = {"proj_hidden_dim": 24, "proj_output_dim": 16}
    settings = {
        "method_kwargs__task": "barlow_twins",
        "method_kwargs__task_kwargs": {**small, "form": "uncentred"},
    }
    alone, plugin = build(**settings), MetaMask(method_config(**NO_META, method_kwargs__alpha=0.0))
    plugin.redundancy_head.load_state_dict(alone.task.projector.state_dict())
    feats = [torch.randn(8, 256) for _ in range(2)]
    loss, *_ = alone.regular_loss({"feats": feats}, None)
    torch.testing.assert_close(plugin.regular_loss({"feats": feats}, None)[0], loss)


def test_it_is_icl_msr_without_lambda():
    torch.manual_seed(0)
    plugin = ICLMSR(icl_msr_config(**NO_META, method_kwargs__lamb=0.0, method_kwargs__gamma=0.0))
    assert losses(plugin, original=True) == losses(build())


def test_its_factors_multiply_the_loss():
    feats = [torch.randn(8, 256) for _ in range(2)]
    plain, scaled = build(), build(method_kwargs__alpha=3.0, method_kwargs__scale_loss=0.5)
    expected, *_ = plain.regular_loss({"feats": feats}, None)
    loss, parts, *_ = scaled.regular_loss({"feats": feats}, None)
    torch.testing.assert_close(loss, 1.5 * expected)
    torch.testing.assert_close(parts["train_task_loss"], expected)


@pytest.mark.parametrize("shared", [False, True])
def test_feature_dropout_reaches_the_task(shared):
    dropout = {"rate": 0.5, "shared": shared}
    model = build(method_kwargs__feature_dropout=dropout, **task_settings("barlow_twins"))
    model.backbone.register_forward_hook(lambda module, inputs, h: h + 1)  # no feature is 0 by itself
    seen = []
    model.task.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    trainer = train(model, steps=1)
    first, second = ((h == 0) for h in seen[0])
    assert 0.4 < first.float().mean() < 0.6
    assert torch.equal(first, second) == shared
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


def test_z_is_there_in_evaluation_only():
    model = build()
    images = torch.randn(4, 3, 32, 32)
    assert "z" not in model(images)
    assert model.eval()(images)["z"].shape == (4, 16)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"method_kwargs__alhpa": 1}, "a key of method_kwargs must be one of .*; did you mean 'alpha'"),
        ({"method_kwargs__alpha": 0}, "method_kwargs.alpha must be > 0, got 0"),
        ({"method_kwargs__feature_dropout": {"rate": 1.0}}, "feature_dropout.rate must be in"),
        ({"method_kwargs__feature_dropout": {"p": 0.1}}, "a key of method_kwargs.feature_dropout"),
    ],
)
def test_wrong_input(overrides, message):
    with pytest.raises(UserError, match=message):
        build(**overrides)
