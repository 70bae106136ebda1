"""``ablation=official`` against the authors' release: its own code, on the same weights and batches."""

import importlib.util
import math
import os
import sys
import types
from functools import partial
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from method_config import icl_msr_config, method_config, task_settings
from method_training import Views, train
from torch import nn
from torch.utils.data import DataLoader

from metamask_plugin.cli.config import complete, for_method
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.knn import knn_hits, masked_features
from metamask_plugin.methods import ICLMSR, MetaMask
from metamask_plugin.methods.meta_step import MetaStep

CONFIGS = Path(__file__).resolve().parents[2] / "scripts" / "pretrain"
SHIPPED = sorted(
    str(path.relative_to(CONFIGS).with_suffix("")) for path in CONFIGS.rglob("metamask_barlow.yaml")
)

RELEASE = Path(os.environ.get("METAMASK_RELEASE", Path.home() / "MetaMask"))
LIGHTLY = Path(os.environ.get("LIGHTLY_1_0_8", Path.home() / "lightly-1.0.8"))
needs_release = pytest.mark.skipif(
    not (RELEASE / "meta-mask.py").exists(),
    reason=f"no release in METAMASK_RELEASE: git clone https://github.com/lionellee9089/MetaMask {RELEASE}",
)
needs_lightly = pytest.mark.skipif(
    not (LIGHTLY / "lightly/models/simsiam.py").exists(),
    reason=f"no lightly in LIGHTLY_1_0_8: pip install --no-deps --target {LIGHTLY} lightly==1.0.8",
)

EPOCHS, STEPS, BATCH = 3, 1, 16


def official(name, *overrides):
    """A shipped config with ``ablation=official``, as a method is built from it."""
    with initialize_config_dir(str(CONFIGS), version_base="1.2"):
        cfg = compose(name, overrides=["ablation=official", "accelerator=cpu", *overrides])
    return for_method(complete(cfg))


def module_from(path, name):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def release_modules(monkeypatch):
    """Makes the release's files importable: of lightly its models' files alone, of Lightning the module."""
    kept = set(sys.modules)
    for name in ("loss", "utils", "models"):  # the release's own names
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("lightly", "lightly.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(LIGHTLY / name.replace(".", "/"))]  # without running its __init__
        monkeypatch.setitem(sys.modules, name, package)
    sys.modules["lightly"].models = sys.modules["lightly.models"]
    if LIGHTLY.exists():
        sys.modules["lightly.models"].ResNetGenerator = importlib.import_module(
            "lightly.models.resnet"
        ).ResNetGenerator
    lightning = types.ModuleType("pytorch_lightning")
    lightning.LightningModule = nn.Module
    monkeypatch.setitem(sys.modules, "pytorch_lightning", lightning)
    monkeypatch.syspath_prepend(str(RELEASE))
    monkeypatch.setattr(torch.Tensor, "cuda", lambda tensor: tensor)
    yield
    for name in set(sys.modules) - kept:
        if name.split(".")[0] in ("loss", "utils", "models", "lightly", "pytorch_lightning"):
            del sys.modules[name]


class Recorded:
    """What one training does, step by step; ``parts`` are encoder, head of L_drr, and the task's head."""

    def __init__(self, parts, logit):
        self.parts, self.logit = parts, logit
        self.losses, self.gradients, self.meta_gradients = [], [], []
        self.weights, self.statistics, self.logits = [], [], []

    def keep_gradients(self):
        self.gradients.append([_joined(weight.grad for weight in _weights(part)) for part in self.parts])

    def keep_meta_gradient(self):
        self.meta_gradients.append(self.logit.grad.clone())

    def keep_state(self):
        self.weights.append([_joined(_weights(part)) for part in self.parts])
        self.statistics.append([_joined(_statistics(part)) for part in self.parts])
        self.logits.append(self.logit.detach().clone())


def _layers(part):
    """Layers with weights, in an order that both implementations share."""
    return [
        m for m in part.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.modules.batchnorm._BatchNorm)
    ]


def _weights(part):
    """Without the biases of linear layers: BatchNorm follows them all, and ours have none."""
    for layer in _layers(part):
        yield layer.weight
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            yield layer.bias


def _statistics(part):
    for layer in _layers(part):
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            yield from (layer.running_mean, layer.running_var, layer.num_batches_tracked)


def _joined(tensors):
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def drive_release(release, batches, images):
    """Its training_step on every batch, its training_epoch_end after every epoch."""
    network = release.resnet_simsiam
    record = Recorded(
        [network.backbone, network.projection_mlp, network.projection_mlp2], release.auto_mask.mask
    )
    optimizers, schedulers = release.configure_optimizers()
    for optimizer in optimizers:  # torch 1.10's default
        optimizer.zero_grad = partial(optimizer.zero_grad, set_to_none=False)
    release.log = lambda *args, **kwargs: None
    release.optimizers = lambda use_pl_optimizer: optimizers
    release.lr_schedulers = lambda: schedulers
    backwards = []

    def manual_backward(loss):
        loss.backward()
        backwards.append(loss)
        if len(backwards) % 3 == 1:  # the regular step's, the trial step's, the outer loss's
            record.keep_gradients()

    release.manual_backward = manual_backward
    optimizers[1].register_step_pre_hook(lambda *_: record.keep_meta_gradient())
    release.dataloader_kNN = [(*images, None)]
    for _ in range(EPOCHS):
        release.train()
        for batch_idx, views in enumerate(batches):
            record.losses.append(release.training_step((views, None, None), batch_idx).detach())
            record.keep_state()
        release.training_epoch_end(None)
    return record


def drive_ours(model, batches):
    """Lightning's training loop, as main_pretrain.py runs it."""
    record = Recorded([model.backbone, model.redundancy_head, model.task.projector], model.mask.logit)

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, *args):
            record.keep_gradients()

        def on_train_batch_end(self, trainer, pl_module, *args):  # before the module's own, the meta step
            record.losses.append(pl_module.step.metrics["train_loss"].detach())

    def meta_step(main, step=model.meta.step):
        record.keep_meta_gradient()
        step(main)

    def on_train_batch_end(*args, hook=model.on_train_batch_end):
        hook(*args)
        record.keep_state()

    model.meta.step, model.on_train_batch_end = meta_step, on_train_batch_end
    samples = [(i, [views[0][j], views[1][j]], 0) for i, views in enumerate(batches) for j in range(BATCH)]
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=EPOCHS,
        logger=False,
        callbacks=[Keep()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, DataLoader(samples, batch_size=BATCH))
    return record


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.mark.slow
@needs_release
@needs_lightly
def test_it_trains_as_the_release_does(double, release_modules):
    """Three epochs of one batch of noise: losses, gradients, weights, mask, statistics; and kNN."""
    torch.manual_seed(0)
    program = module_from(RELEASE / "meta-mask.py", "release_meta_mask")
    release = program.MetaMaskBartonTwins(
        None, gpus=0, classes=10, knn_k=5, knn_t=1.0, projection_out_dim=2048, cl_projection_out_dim=256,
        device="cpu", enable_meta=True, enable_sigmoid=True, weight_cl=10, max_epochs=EPOCHS,
        second_order=True, eval_only=False,
    )  # fmt: skip
    cfg = official("cifar/metamask_barlow", f"max_epochs={EPOCHS}")
    cfg.data.num_classes = 10
    model = MetaMask(cfg)

    network = release.resnet_simsiam
    pairs = [
        (model.backbone, network.backbone),
        (model.redundancy_head, network.projection_mlp),
        (model.task.projector, network.projection_mlp2),
    ]
    with torch.no_grad():
        for ours, theirs in pairs:
            for layer, other in zip(_layers(ours), _layers(theirs), strict=True):
                layer.weight.copy_(other.weight)
                if isinstance(other, nn.Linear):
                    other.bias.zero_()  # of no function, but BatchNorm's running mean contains it
        logit = 0.5 * torch.randn(512)
        model.mask.logit.copy_(logit)
        release.auto_mask.mask.copy_(logit)
    batches = [torch.randn(2, BATCH, 3, 32, 32) for _ in range(STEPS)]
    bank, query = torch.randn(2, 40, 3, 32, 32)
    labels = torch.randint(10, (40,))

    theirs = drive_release(release, batches, (bank, labels))
    ours = drive_ours(model, batches)

    for name in ("losses", "meta_gradients", "logits"):
        for step, (mine, other) in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            assert relative(mine, other) < 1e-10, f"{name}, step {step}"
    for name in ("gradients", "weights", "statistics"):
        for step, parts in enumerate(zip(getattr(ours, name), getattr(theirs, name), strict=True)):
            for part, mine, other in zip(("encoder", "head of L_drr", "task's head"), *parts):
                assert relative(mine, other) < 1e-10, f"{name} of the {part}, step {step}"
    assert len(ours.losses) == EPOCHS * STEPS
    assert relative(ours.logits[-1], logit) > 1e-6  # it moved

    release.eval()
    with torch.no_grad():
        count, hits = release.validation_step((query, labels, None), 0)
        banked, asked = (Features(model.eval().backbone(x), labels) for x in (bank, query))
    mask = model.mask.values()
    banked, asked = masked_features(banked, mask), masked_features(asked, mask)
    ours = knn_hits(banked, asked, (5,), temperature=1.0)[5]
    assert (count, hits) == (40, float(ours[:, 0].sum()))


@needs_release
def test_knn_is_the_releases(release_modules):
    """k = 5 at temperature 1 on masked features; the release's are of length 1."""
    torch.manual_seed(0)
    utils = module_from(RELEASE / "utils.py", "release_utils")
    labels, mask = torch.randint(10, (300,)), torch.rand(16)
    train, test = (masked_features(Features(torch.randn(300, 16), labels), mask).feats for _ in range(2))
    unit = partial(nn.functional.normalize, dim=1)
    theirs = utils.knn_predict(unit(test), unit(train).T, labels, classes=10, knn_k=5, knn_t=1.0)
    bank, as_theirs = Features(train, labels), Features(test, theirs[:, 0])
    assert knn_hits(bank, as_theirs, (5,), temperature=1.0)[5][:, 0].all()
    assert not knn_hits(bank, as_theirs, (200,), temperature=0.07)[200][:, 0].all()


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_over_every_config(name):
    cfg = official(name)
    cfg.data.num_classes = 10
    cfg = MetaMask.add_and_assert_specific_cfg(cfg)
    optimizer, scheduler, meta = cfg.optimizer, cfg.scheduler, cfg.method_kwargs.meta
    assert (optimizer.name, optimizer.weight_decay, optimizer.kwargs) == ("sgd", 5e-4, {"momentum": 0.9})
    assert optimizer.lr / optimizer.batch_size == pytest.approx(1e-3 / 512)
    assert (scheduler.name, scheduler.warmup_epochs, scheduler.interval) == ("warmup_cosine", 0, "epoch")
    assert (meta.get("inner_lr"), meta.every_n_steps, meta.update_statistics) == (None, 1, True)
    assert cfg.evaluation.knn.every_n_epochs == 1
    assert (list(cfg.data.mean), list(cfg.data.std)) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    stem = cfg.backbone.kwargs.get("stem")
    assert stem == ("release" if name == "cifar/metamask_barlow" else None)


def test_the_stem_can_be_chosen_under_the_preset():
    cfg = method_config("resnet18", backbone__kwargs={"stem": "cifar"}, method_kwargs__preset="official")
    assert MetaMask.add_and_assert_specific_cfg(cfg).backbone.kwargs.stem == "cifar"
    plain = MetaMask.add_and_assert_specific_cfg(method_config("resnet18"))
    assert "stem" not in plain.backbone.kwargs


def build(**overrides):
    torch.manual_seed(0)
    return MetaMask(method_config(method_kwargs__preset="official", **overrides))


@pytest.mark.parametrize("when", ["after_step", "epoch_end"])
def test_both_steps_have_the_epochs_rate(when):
    """CosineAnnealingLR's by epoch, which the epoch's last meta step has, too."""
    model = build(
        max_epochs=3,
        scheduler={"name": "warmup_cosine", "warmup_epochs": 0, "interval": "epoch"},
        method_kwargs__meta={"when": when},
    )
    regular, trials, mask = [], [], []

    class Keep(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            regular.append(optimizer.param_groups[0]["lr"])

    def trial(*args, make=model.meta.inner_step):
        trials.append(make(*args).encoder.lr)
        return make(*args)

    def step(main, make=model.meta.step):
        make(main)
        mask.append(model.meta.optimizer.param_groups[0]["lr"])

    model.meta.inner_step, model.meta.step = trial, step
    train(model, steps=2, callbacks=[Keep()], max_epochs=3)
    cosine = [(1 + math.cos(math.pi * epoch / 3)) / 2 for epoch in (0, 0, 1, 1, 2, 2)]
    assert regular == trials == pytest.approx([0.1 * factor for factor in cosine])
    assert mask == pytest.approx([1e-3 * factor for factor in cosine])


def test_the_meta_step_moves_the_statistics_at_the_new_weights_and_nothing_else():
    def trained(moves):
        model = build(method_kwargs__meta={"update_statistics": moves})
        train(model, steps=1)
        return model

    plain, moved = trained(False), trained(True)
    for (name, value), other in zip(plain.state_dict().items(), moved.state_dict().values()):
        assert torch.equal(value, other) != ("running_" in name or "num_batches" in name), name
    views = Views().images[:8].unbind(1)
    start = torch.full((plain.features_dim,), 0.5)  # the meta step's mask, not what it made of it
    with torch.no_grad():
        for feats in [plain.train().backbone(x) * start for x in views]:
            plain.redundancy_head(feats), plain.task.projector(feats)
    for (name, value), other in zip(plain.state_dict().items(), moved.state_dict().values()):
        torch.testing.assert_close(value, other, msg=name)


def test_statistics_cannot_move_in_a_shared_pass():
    with pytest.raises(UserError, match="update_statistics must be False with when=before_step"):
        build(method_kwargs__meta={"when": "before_step", "update_statistics": True})


@pytest.mark.parametrize(("method", "config"), [(MetaMask, method_config), (ICLMSR, icl_msr_config)])
def test_statistics_move_beside_a_captured_meta_step_too(monkeypatch, graph_stand_in, method, config):
    """With a target network and half a batch, whose target features are computed anew."""

    def trained(captured, moves=True):
        monkeypatch.setattr(MetaStep, "can_capture", lambda self, method: captured)
        torch.manual_seed(0)
        cfg = config(**task_settings("byol"))
        cfg.method_kwargs.meta = {"update_statistics": moves, "batch_share": 0.5}
        model = method(cfg)
        train(model, 3, original=method is ICLMSR)
        return model.state_dict()

    launched, captured = trained(False), trained(True)
    for name, value in launched.items():
        assert torch.equal(value, captured[name]), name
    still = trained(False, moves=False)
    assert not torch.equal(
        still["backbone.layers.1.running_mean"], launched["backbone.layers.1.running_mean"]
    )
