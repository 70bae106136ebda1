"""ICL-MSR inside a Trainer: what each step changes, and what it leaves."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from method_config import icl_msr_config, method_config
from method_training import Views, train
from torch.utils.data import DataLoader

from metamask_plugin.errors import UserError
from metamask_plugin.host import BaseMethod
from metamask_plugin.losses import nt_xent_loss
from metamask_plugin.methods import ICLMSR
from metamask_plugin.methods.interventional import LEVELS
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.tasks import SimCLR

NO_META = {"method_kwargs__meta": {"enabled": False}}
NO_MSR = {"method_kwargs__lamb": 0.0, "method_kwargs__gamma": 0.0}


def build(**overrides):
    torch.manual_seed(0)
    return ICLMSR(icl_msr_config(**overrides))


def fit(model, **kwargs):
    return train(model, original=True, **kwargs)


def moved(model, start):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}


@pytest.mark.parametrize("level", LEVELS)
def test_both_levels_move(level):
    model = build(method_kwargs__level=level)
    start = copy.deepcopy(model.state_dict())
    trainer = fit(model)
    names = moved(model, start)
    assert any(name.startswith("backbone.") for name in names)
    assert any(name.startswith("task.projector") for name in names)
    assert {name for name in names if name.startswith("regularizer.")} == {
        f"regularizer.{name}" for name, _ in model.regularizer.named_parameters()
    }
    for metric in ("task", "msr", "outer", "uniformity"):
        assert torch.isfinite(trainer.callback_metrics[f"train_{metric}_loss"])
    assert 0 < trainer.callback_metrics["msr_overlap"] <= 1
    assert trainer.callback_metrics["meta_gradient_task"] > 0


class Watch(pl.Callback):
    """Compares the model right before and right after the method's own end-of-batch hook."""

    def __init__(self):
        self.before, self.regularizers = {}, []

    def on_train_batch_end(self, trainer, pl_module, *args):  # runs before the module's hook
        state = {name: value.clone() for name, value in pl_module.state_dict().items()}
        self.before = {k: v for k, v in state.items() if not k.startswith("regularizer.")}
        self.regularizers.append({k: v for k, v in state.items() if k.startswith("regularizer.")})

    def on_train_batch_start(self, trainer, pl_module, *args):
        for name, value in self.before.items():
            assert torch.equal(pl_module.state_dict()[name], value), name


def same(first, second):
    return all(torch.equal(value, second[name]) for name, value in first.items())


def test_the_meta_step_moves_f_msr_alone_and_the_regular_step_leaves_it():
    model, watch = build(), Watch()
    start = copy.deepcopy(model.state_dict())
    fit(model, callbacks=[watch])
    assert same(watch.regularizers[0], start)  # before the first meta step
    assert not same(watch.regularizers[1], watch.regularizers[0])
    assert all(p.grad is None and not p.requires_grad for p in model.regularizer.parameters())


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_with_the_meta_stage_off_f_msr_does_not_move(norm):
    regularizer = {"n": 3, "kwargs": {"width": 8, "norm": norm}}
    model = build(**NO_META, method_kwargs__regularizer=regularizer)
    start = copy.deepcopy(model.state_dict())
    trainer = fit(model)
    assert not any(name.startswith("regularizer.") for name in moved(model, start))  # statistics included
    assert "train_msr_loss" in trainer.callback_metrics  # it does act on the encoder


def test_with_the_meta_stage_on_the_uniformity_term_falls():
    seen = []

    class Collect(pl.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(float(trainer.callback_metrics["train_uniformity_loss"]))

    meta = {"optimizer": {"lr": 3e-3}}
    fit(build(method_kwargs__meta=meta), callbacks=[Collect()], max_epochs=6)
    assert seen[-1] < seen[0] - 0.1
    assert all(later < earlier for earlier, later in zip(seen, seen[1:]))


class PlainSimCLR(BaseMethod):
    """SimCLR as one would write it without us."""

    def __init__(self, cfg):
        super().__init__(cfg)
        self.task = SimCLR(self.features_dim, proj_hidden_dim=24, proj_output_dim=16, temperature=0.5)

    @property
    def learnable_params(self):
        return [*super().learnable_params, {"name": "task", "params": list(self.task.parameters())}]

    def training_step(self, batch, batch_idx):
        out = super().training_step(batch, batch_idx)
        z = [self.task.projector(h) for h in out["feats"]]
        return nt_xent_loss(z, 0.5) + out["loss"]


@pytest.mark.parametrize("overrides", [NO_MSR, {**NO_MSR, **NO_META}])
def test_without_lambda_and_gamma_it_is_plain_simclr_to_the_last_bit(overrides):
    ours = build(**overrides)
    fit(ours)
    torch.manual_seed(0)
    plain = PlainSimCLR(method_config(method="simclr", method_kwargs={}))
    train(plain)
    ours = {name: value for name, value in ours.state_dict().items() if not name.startswith("regularizer.")}
    assert ours.keys() == plain.state_dict().keys()
    assert same(plain.state_dict(), ours)


def test_without_lambda_and_gamma_f_msr_has_nothing_to_learn():
    model = build(**NO_MSR)
    start = copy.deepcopy(model.state_dict())
    fit(model)
    assert not any(name.startswith("regularizer.") for name in moved(model, start))
    assert build(**NO_MSR, **NO_META).regularizer is None


def test_lambda_changes_the_first_step_and_the_meta_step_the_second():
    def losses(**overrides):
        seen = []

        class Collect(pl.Callback):
            def on_train_batch_end(self, trainer, pl_module, outputs, *args):
                seen.append(float(outputs["loss"]))

        fit(build(**overrides), callbacks=[Collect()])
        return seen

    full, no_meta, no_msr = losses(), losses(**NO_META), losses(**NO_MSR)
    assert full[0] == no_meta[0] != no_msr[0]
    assert full[1] != no_meta[1]


def test_the_regular_loss_is_equation_5():
    model, logged = build(method_kwargs__lamb=3.0), {}
    model.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)] + [torch.randn(8, 3, 36, 36)]
    loss = model.training_step([torch.arange(8), views, torch.arange(8)], 0)
    logged |= model.step.metrics
    regular = logged["train_task_loss"] + 3.0 * logged["train_msr_loss"]
    torch.testing.assert_close(logged["train_loss"], regular)
    torch.testing.assert_close(loss, regular + logged["train_class_loss"])


def test_the_backbone_never_sees_the_unaugmented_view():
    model, sizes = build(), []
    model.backbone.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[-1]))
    model.regularizer.register_forward_pre_hook(lambda module, inputs: sizes.append(-inputs[0].shape[-1]))
    model.log_dict = lambda *args, **kwargs: None
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)] + [torch.randn(8, 3, 36, 36)]
    model.training_step([torch.arange(8), views, torch.arange(8)], 0)
    assert sizes == [32, 32, -36]


def test_a_crop_of_the_whole_image_is_no_crop():
    whole = {"enabled": True, "crop_min_scale": 1.0, "crop_max_scale": 1.0}
    augmentations = [{"crop_size": 32, "num_crops": 2}, {"crop_size": 36, "num_crops": 1, "rrc": whole}]
    assert build(augmentations=augmentations).original.crop_size == 36


def test_small_crops_beside_it_still_count():
    augmentations = [{"crop_size": size, "num_crops": count} for size, count in ((32, 2), (24, 1), (36, 1))]
    augmentations[1]["horizontal_flip"] = {"prob": 0.5}
    model = build(augmentations=augmentations, data__num_small_crops=2)
    assert (model.num_large_crops, model.num_small_crops, model.num_crops) == (2, 1, 3)
    model.log_dict = lambda *args, **kwargs: None
    views = [torch.randn(8, 3, size, size) for size in (32, 32, 24, 36)]
    assert model.training_step([torch.arange(8), views, torch.arange(8)], 0).isfinite()
    with pytest.raises(UserError, match="level must be features or projection with small crops"):
        build(augmentations=augmentations, data__num_small_crops=2, method_kwargs__level="feature_map")


@pytest.mark.parametrize(
    "augmentations",
    [
        [{"crop_size": 32, "num_crops": 2}],
        [{"crop_size": 32, "num_crops": 2}, {"crop_size": 32, "num_crops": 1}],
        [{"crop_size": 32, "num_crops": 2}, {"crop_size": 36, "num_crops": 2}],
        [{"crop_size": 32, "num_crops": 2}, {"crop_size": 36, "num_crops": 1, "rrc": {"enabled": True}}],
        [{"crop_size": 32, "num_crops": 2}, {"crop_size": 36, "num_crops": 1, "grayscale": {"prob": 0.1}}],
        None,
    ],
)
def test_a_missing_unaugmented_view_is_named(augmentations):
    with pytest.raises(UserError, match="augmentations must be a list whose last block makes f_msr's"):
        build(augmentations=augmentations)
    if augmentations and len(augmentations) == 1:  # nobody needs it there
        build(augmentations=augmentations, data__num_small_crops=0, **NO_MSR, **NO_META)


def test_per_epoch_all_meta_steps_follow_the_last_regular_step():
    model, watch = build(method_kwargs__meta={"when": "epoch_end"}), Watch()
    counted = []
    model.meta.run = lambda method, views, *more, run=model.meta.run, **named: (
        counted.append(views[0][:, 0, 0, 0].tolist()),
        run(method, views, *more, **named),
    )
    start = copy.deepcopy(model.state_dict())
    trainer = fit(model, callbacks=[watch], max_epochs=2)
    assert same(watch.regularizers[0], start) and same(watch.regularizers[2], start)
    assert not same(watch.regularizers[3], start) and same(watch.regularizers[5], watch.regularizers[3])
    assert counted == 2 * [Views().images[i : i + 8, 0, 0, 0, 0].tolist() for i in (0, 8, 16)]
    assert "train_outer_loss" in trainer.callback_metrics


def test_per_epoch_every_nth_batch_and_limited_epochs():
    model, counted = build(method_kwargs__meta={"when": "epoch_end", "every_n_steps": 2}), []
    model.meta.run = lambda method, views, *more, run=model.meta.run, **named: (
        counted.append(len(views[0])),
        run(method, views, *more, **named),
    )
    fit(model, steps=2)
    assert counted == [8]


@pytest.mark.parametrize("estimator", ["exact", "unrolled", "finite_difference"])
def test_estimators_agree_on_the_first_step(estimator):
    kwargs = {"estimator": estimator, "optimizer": {"name": "sgd", "lr": 1.0}}
    if estimator == "finite_difference":
        kwargs["estimator_kwargs"] = {"r": 1e-3}
    model = build(method_kwargs__meta=kwargs)
    reference = build(method_kwargs__meta={**kwargs, "estimator": "exact", "estimator_kwargs": {}})
    fit(model, steps=1)
    fit(reference, steps=1)
    for name, value in model.regularizer.state_dict().items():
        torch.testing.assert_close(value, reference.regularizer.state_dict()[name], rtol=1e-2, atol=1e-3)


def test_any_timm_model_can_be_f_msr():
    model = build(method_kwargs__regularizer={"n": 2, "name": "test_convnext"})
    assert model.regularizer.trunk.num_features == build_encoder("test_convnext", 36).num_features
    start = copy.deepcopy(model.state_dict())
    fit(model, steps=1)
    assert any(name.startswith("regularizer.trunk") for name in moved(model, start))


def test_its_state_is_in_the_checkpoint():
    model = build()
    trainer = fit(model)
    checkpoint = {}
    model.on_save_checkpoint(checkpoint)
    again = build()
    again.on_load_checkpoint(checkpoint)
    again.load_state_dict(model.state_dict())
    again.meta.start(again.meta_parameters(), trainer.optimizers[0])
    assert again.meta.optimizer.state_dict()["state"][0]["step"] == 3
    # solo-learn's linear evaluation renames keys with these words
    assert not any("encoder" in name for name in model.state_dict())
    assert not any("backbone" in name for name in model.regularizer.state_dict())


def test_z_is_there_in_evaluation_only():
    for level in LEVELS:
        model = build(method_kwargs__level=level)
        x = torch.randn(2, 3, 32, 32)
        assert "z" not in model.train()(x)
        out = model.eval()(x)
        assert out["z"].shape == (2, 16) and out["feats"].shape == (2, 256)
        torch.testing.assert_close(out["feats"], model.backbone(x))


def test_warmup_step_is_the_papers_schedule():
    scheduler = {"name": "warmup_step", "warmup_steps": 4, "lr_decay_steps": [-2, -1], "decay_factor": 0.2}
    rates = []

    class Collect(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, *args):
            rates.append(trainer.optimizers[0].param_groups[0]["lr"])

    model = build(scheduler=scheduler, max_epochs=4, **NO_META)
    fit(model, callbacks=[Collect()], max_epochs=4)
    expected = [0.25, 0.5, 0.75, 1, 1, 1, 0.2, 0.2, 0.2, 0.04, 0.04, 0.04]
    assert rates == pytest.approx([0.1 * factor for factor in expected])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"lamb": -1}, r"method_kwargs.lamb must be >= 0, got -1"),
        ({"gamma": -1}, "gamma must be >= 0"),
        ({"level": "feature"}, "did you mean 'features'"),
        ({"uniformity": {"t": 0}}, "uniformity.t must be > 0"),
        ({"uniformity": {"scope": "all"}}, "uniformity.scope must be one of batch, image"),
        ({"regularizer": {"n": 0}}, "regularizer.n must be an integer >= 1"),
        ({"regularizer": {"name": "conv5"}}, "method_kwargs.regularizer.name must be one of"),
        ({"regularizer": {"depth": 4}}, "a key of method_kwargs.regularizer must be one of"),
        ({"meta": {"when": "step"}}, "meta.when must be one of after_step, before_step"),
        ({"preset": "official"}, "preset must be one of paper"),
        ({"alpha": 1}, "a key of method_kwargs must be one of"),
    ],
)
def test_wrong_settings(kwargs, message):
    with pytest.raises(UserError, match=message):
        build(**{f"method_kwargs__{key}": value for key, value in kwargs.items()})


def test_a_level_that_a_timm_encoder_does_not_have():
    with pytest.raises(UserError, match="needs an encoder with a feature map"):
        build(backbone="test_vit", method_kwargs__level="feature_map")


def test_what_the_loader_gives_is_checked():
    with pytest.raises((UserError, AssertionError)):  # solo-learn asserts
        model = build()
        model.log_dict = lambda *args, **kwargs: None
        views = next(iter(DataLoader(Views(), batch_size=8)))[1]
        model.training_step([torch.arange(8), views, torch.arange(8)], 0)
