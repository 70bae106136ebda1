"""Holds the host in use to the contract: the embedded one here, solo-learn in test_solo_learn.py."""

import inspect

import pytest
import torch
from method_config import method_config
from omegaconf import OmegaConf

from metamask_plugin import host
from metamask_plugin.host import METHODS, BaseMethod, contract, register


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BaseMethod(method_config())


def batch(n=6, views=2, size=32):
    return [torch.arange(n), [torch.randn(n, 3, size, size) for _ in range(views)], torch.arange(n) % 10]


def silence(model):
    """Outside a Trainer nothing can be logged."""
    model.log = model.log_dict = lambda *args, **kwargs: None
    return model


def test_base_method_takes_a_config_alone():
    assert list(inspect.signature(BaseMethod.__init__).parameters)[1:] == ["cfg"]


def test_members(model):
    assert model.features_dim == 256
    assert model.num_large_crops == 2
    assert model.no_channel_last is False
    assert model.classifier(torch.randn(3, 256)).shape == (3, 10)
    assert model.backbone(torch.randn(3, 3, 32, 32)).shape == (3, 256)


@pytest.mark.parametrize("key", sorted(contract.DEFAULTS))
def test_defaults(key):
    cfg = BaseMethod.add_and_assert_specific_cfg(method_config())
    expected = {"optimizer.kwargs": {"momentum": 0.9}}.get(key, contract.DEFAULTS[key])
    given = {"method_kwargs": method_config().method_kwargs}.get(key, expected)
    assert OmegaConf.select(cfg, key) == given


def test_learnable_params_name_backbone_and_classifier(model):
    groups = model.learnable_params
    assert [group["name"] for group in groups] == ["backbone", "classifier"]
    assert groups[1]["lr"] == 0.1 and groups[1]["weight_decay"] == 0
    counted = sum(p.numel() for group in groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters())


def test_forward(model):
    out = model(torch.randn(4, 3, 32, 32))
    assert out["feats"].shape == (4, 256) and out["logits"].shape == (4, 10)


def test_the_classifier_does_not_train_the_backbone(model):
    model(torch.randn(4, 3, 32, 32))["logits"].sum().backward()
    assert all(p.grad is None for p in model.backbone.parameters())
    assert model.classifier.weight.grad is not None


def test_training_step_runs_each_view_on_its_own(model):
    data = batch()
    out = silence(model).training_step(data, 0)
    assert len(out["feats"]) == len(out["logits"]) == 2
    torch.testing.assert_close(out["feats"][0], model.backbone(data[1][0]), rtol=1e-4, atol=1e-4)
    assert out["loss"].requires_grad and out["loss"].dim() == 0
    assert 0 <= float(out["acc1"]) <= float(out["acc5"]) <= 100


def test_unlabelled_targets_are_ignored(model):
    data = batch()
    data[2] = torch.tensor([-1, -1, 3, -1, -1, -1])
    assert silence(model).training_step(data, 0)["loss"].isfinite()


@pytest.mark.parametrize("name", contract.OPTIMIZERS)
def test_optimizers(name):
    model = BaseMethod(method_config(optimizer__name=name, optimizer__kwargs={}))
    optimizer = model.configure_optimizers()
    assert len(optimizer.param_groups) >= 2
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_methods_hold_our_method_and_registration_is_idempotent():
    from metamask_plugin.methods import MetaMask

    assert METHODS["metamask"] is MetaMask
    register("metamask", MetaMask)
    assert issubclass(MetaMask, BaseMethod)


def test_registering_over_a_foreign_class_is_refused():
    class Foreign:
        pass

    with pytest.raises(ValueError, match="already registered by"):
        register("metamask", Foreign)


def test_the_host_has_a_name():
    assert host.name in ("solo", "embedded")


def test_views_are_counted_and_a_method_may_take_some_out():
    model = silence(BaseMethod(method_config(data__num_small_crops=1)))
    assert (model.num_large_crops, model.num_small_crops, model.num_crops) == (2, 1, 3)
    assert model.multicrop
    model.num_small_crops, model.num_crops, model.multicrop = 0, 2, False
    assert len(model.training_step(batch(), 0)["feats"]) == 2


def test_what_forward_adds_comes_as_a_list_of_views(model):
    plain = silence(model).forward
    model.forward = lambda X: {**plain(X), "mean": X.mean()}
    indexes, views, targets = batch()
    assert model.training_step([indexes, views, targets], 0)["mean"] == [view.mean() for view in views]


def test_with_scheduler_none_the_optimiser_comes_alone(model):
    assert model.scheduler == model.cfg.scheduler.name
    model.scheduler = "none"
    assert isinstance(model.configure_optimizers(), torch.optim.Optimizer)
