"""Faults that others reported of self-supervised and bi-level training, and that leave no message."""

import copy
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import pytest
import torch
from killed_runs import config
from method_config import baseline_config, method_config, task_settings
from method_training import Views, quiet_trainer, train
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from metamask_plugin import host
from metamask_plugin.bilevel import (
    BilevelProblem,
    Exact,
    Functional,
    InnerStep,
    MomentumStep,
    PlainStep,
    Unrolled,
)
from metamask_plugin.cli.config import complete
from metamask_plugin.data.loaders import EpochPosition, EpochShuffle, TrainingLoader
from metamask_plugin.errors import UserError
from metamask_plugin.methods import Baseline, MetaMask

embedded = pytest.mark.skipif(host.name != "embedded", reason="solo-learn's own host does this itself")


class Rates(pl.Callback):
    """The learning rate of each optimiser step, and the target network's progress."""

    def __init__(self, model):
        self.rates, self.progress = [], []
        after_step = model.task.after_step

        def noted(backbone, progress):
            self.progress.append(progress)
            after_step(backbone, progress)

        model.task.after_step = noted

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


class SaveAfter(pl.Callback):
    def __init__(self, epochs, path):
        self.epochs, self.path = epochs, path

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == self.epochs:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True


def scheduled(path=None, batch_size=4, stop=None, scheduler="warmup_cosine", interval="step", **kwargs):
    """Trains BYOL on 16 images for four epochs, or goes on from a checkpoint."""
    schedule = {"name": scheduler, "warmup_epochs": 0, "interval": interval, "lr_decay_steps": [2]}
    model = Baseline(baseline_config(max_epochs=4, scheduler=schedule, **task_settings("byol")))
    rates = Rates(model)
    callbacks = [rates] if stop is None else [rates, SaveAfter(stop, path)]
    trainer = quiet_trainer(max_epochs=4, callbacks=callbacks, **kwargs)
    loader = DataLoader(Views(16), batch_size=batch_size)
    trainer.fit(model, loader, ckpt_path=path if stop is None else None, weights_only=False)
    return rates


def half_cosine(share):
    return 0.1 * (1 + math.cos(math.pi * share)) / 2


@pytest.mark.fault(
    "resume",
    source="Nerogar/OneTrainer#1604, bghira/SimpleTuner#921, open-mmlab/mmdetection#3800",
)
@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4), (4, 4)])
def test_schedules_keep_their_share_when_an_epoch_has_other_steps(tmp_path, capfd, before, after):
    """Half-way with twice the batch, a count of steps is at the end: rate 0, a target that stands still."""
    path = tmp_path / "half.ckpt"
    first = scheduled(path, before, stop=2)
    assert first.progress[-1] == 0.5
    capfd.readouterr()
    second = scheduled(path, after)
    left = 2 * 16 // after
    assert second.progress == pytest.approx([0.5 + 0.5 * (step + 1) / left for step in range(left)])
    assert second.rates == pytest.approx([half_cosine(0.5 + 0.5 * step / left) for step in range(left)])
    said = "note: an epoch has" in capfd.readouterr().out
    assert said == (before != after)


@pytest.mark.fault("resume", source="Nerogar/OneTrainer#1604, bghira/SimpleTuner#921")
def test_schedules_keep_their_share_when_epochs_change_twice(tmp_path):
    first, second = tmp_path / "one.ckpt", tmp_path / "two.ckpt"
    scheduled(first, 4, stop=1)
    model = Baseline(baseline_config(max_epochs=4, scheduler={"name": "none"}, **task_settings("byol")))
    rates = Rates(model)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[rates, SaveAfter(2, second)], **settings)
    model_loader = DataLoader(Views(16), batch_size=8)
    checkpoint = torch.load(first, weights_only=False)
    checkpoint["lr_schedulers"] = []
    torch.save(checkpoint, first)
    trainer.fit(model, model_loader, ckpt_path=first, weights_only=False)
    assert rates.progress == [0.375, 0.5]
    model = Baseline(baseline_config(max_epochs=4, scheduler={"name": "none"}, **task_settings("byol")))
    rates = Rates(model)
    trainer = pl.Trainer(accelerator="cpu", max_epochs=4, callbacks=[rates], **settings)
    trainer.fit(model, DataLoader(Views(16), batch_size=4), ckpt_path=second, weights_only=False)
    assert rates.progress == [0.5 + 0.0625 * (step + 1) for step in range(8)]


@pytest.mark.fault("resume", source="Nerogar/OneTrainer#1604, huggingface/diffusers#3954")
@pytest.mark.parametrize(("scheduler", "interval"), [("step", "step"), ("warmup_cosine", "epoch")])
def test_a_schedule_by_epoch_is_left_alone(tmp_path, scheduler, interval):
    path = tmp_path / "half.ckpt"
    kwargs = {"scheduler": scheduler, "interval": interval}
    whole = scheduled(None, 16, **kwargs).rates
    scheduled(path, 16, stop=2, **kwargs)  # one step an epoch: both counts are equal
    assert scheduled(path, 8, **kwargs).rates == pytest.approx([r for r in whole[2:] for _ in range(2)])


@pytest.mark.fault(
    "numbers", source="vturrisi/solo-learn#248, vturrisi/solo-learn#286, lucidrains/byol-pytorch#28"
)
@pytest.mark.parametrize(("accumulate", "limit"), [(1, 1.0), (2, 1.0), (3, 1.0), (1, 3), (2, 3)])
def test_target_and_rate_end_with_the_training(accumulate, limit):
    """Accumulation and a limit on the batches shorten an epoch."""
    rates = scheduled(accumulate_grad_batches=accumulate, limit_train_batches=limit)
    batches = 4 if limit == 1.0 else limit
    steps = 4 * math.ceil(batches / accumulate)
    assert rates.progress == pytest.approx([(step + 1) / steps for step in range(steps)])
    assert rates.rates == pytest.approx([half_cosine(step / steps) for step in range(steps)])


@pytest.mark.fault(
    "resume", source="fangchangma/sparse-to-dense.pytorch#19, Lightning-AI/pytorch-lightning#20412"
)
def test_workers_of_several_processes_are_seeded_by_the_epoch():
    """Lightning puts its sampler in place of ours: a resumed epoch had the first one's augmentations."""

    def drawn(epoch):
        sampler = EpochShuffle(range(8), 5)
        loader = TrainingLoader(
            range(8), sampler=sampler, generator=sampler.worker_seeds, position=EpochPosition()
        )
        other = DistributedSampler(range(8), 2, 0, seed=5)
        loader = TrainingLoader(range(8), sampler=other, generator=loader.generator, position=loader.position)
        other.set_epoch(epoch)
        next(iter(loader))
        return loader.generator.initial_seed()

    def alone(epoch):
        sampler = EpochShuffle(range(8), 5)
        sampler.set_epoch(epoch)
        return sampler.worker_seeds.initial_seed()

    assert [drawn(epoch) for epoch in range(3)] == [alone(epoch) for epoch in range(3)]
    assert len({drawn(epoch) for epoch in range(3)}) == 3


DROPPED = {
    "backbone": "test_vit",
    "backbone__kwargs": {"drop_path_rate": 0.5, "proj_drop_rate": 0.3},
}


@pytest.mark.fault("numbers", source="pytorch/functorch#408, pytorch/rl#1740")
@pytest.mark.parametrize("task", ["simclr", "byol"])
def test_views_of_a_meta_step_draw_dropout_masks_of_their_own(task):
    """Evaluations of a meta step repeat their masks; views that share one are easier to tell by it."""
    torch.manual_seed(0)
    model = MetaMask(method_config(**DROPPED, **task_settings(task)))
    x = torch.randn(4, 3, 32, 32)
    before = torch.get_rng_state()
    problem = model.meta_problem([x, x])
    once, again = (problem.encode(problem.encoder_params) for _ in range(2))
    assert torch.equal(once, again) and not torch.equal(once[0], once[1])
    assert torch.equal(problem.first_order_encode(problem.encoder_params), once)
    if task == "byol":
        first, second = model.target_features([x, x], keep_statistics=True)
        assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    regular = [model(x)["feats"] for _ in range(2)]  # as the regular step draws them
    torch.testing.assert_close(once, torch.stack(regular))


@pytest.mark.fault("numbers", source="pytorch/functorch#408")
def test_the_exact_gradient_is_that_of_the_drawn_masks(double):
    torch.manual_seed(0)
    model = MetaMask(method_config(**DROPPED))
    problem = model.meta_problem([torch.randn(4, 3, 32, 32) for _ in range(2)])
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    exact, unrolled = (
        estimator().gradient(problem, trial).outer_params[0] for estimator in (Exact, Unrolled)
    )
    torch.testing.assert_close(exact, unrolled, rtol=1e-9, atol=1e-12)


@pytest.mark.fault("numbers", source="pytorch/pytorch#14518")
def test_the_random_state_is_kept_where_the_module_is():
    """Also where none of its parameters is exposed, as of a target network."""
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).to("meta").requires_grad_(False)
    assert Functional(module).params == {} and Functional(module).devices == {torch.device("meta")}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.fault("numbers", source="pytorch/pytorch#14518")
def test_the_generator_of_a_gpu_is_where_it_was():
    module = nn.Dropout(0.5).cuda()
    module.register_buffer("place", torch.zeros((), device="cuda"))
    before = torch.cuda.get_rng_state()
    Functional(module)({}, torch.ones(8, device="cuda"))
    assert torch.equal(torch.cuda.get_rng_state(), before)


class TrialRates(Rates):
    def __init__(self, model):
        super().__init__(model)
        self.trials = []
        make = model.meta.inner_step

        def trial(*arguments):
            self.trials.append(make(*arguments).encoder.lr)
            return make(*arguments)

        model.meta.inner_step = trial


@pytest.mark.fault("numbers", source="Lightning-AI/pytorch-lightning#7737, facebookresearch/deit#145")
@pytest.mark.parametrize("when", ["after_step", "before_step", "epoch_end"])
@pytest.mark.parametrize(
    "scheduler",
    [
        {"name": "step", "lr_decay_steps": [1, 2]},
        {"name": "warmup_step", "warmup_steps": 0, "lr_decay_steps": [1, 2]},
        {"name": "warmup_cosine", "warmup_epochs": 0},
        {"name": "warmup_cosine", "warmup_epochs": 0, "interval": "epoch"},
    ],
)
def test_the_trial_step_is_as_long_as_the_regular_one(when, scheduler):
    """Lightning has moved the schedule by then: at a cosine's end the trial step had length 0."""
    model = MetaMask(method_config(max_epochs=3, scheduler=scheduler, method_kwargs__meta={"when": when}))
    rates = TrialRates(model)
    train(model, steps=2, callbacks=[rates], max_epochs=3)
    last_of_epoch = [rate for rate in rates.rates[1::2] for _ in range(2)]
    assert rates.trials == (last_of_epoch if when == "epoch_end" else rates.rates)
    assert min(rates.trials) > 0


class OwnRate(MetaMask):
    """A predictor with a rate of its own."""

    @property
    def learnable_params(self):
        predictor = list(self.task.predictor.parameters())
        own = {id(p) for p in predictor}
        groups = super().learnable_params
        for group in groups:
            group["params"] = [p for p in group["params"] if id(p) not in own]
        return [*groups, {"name": "predictor", "params": predictor, "lr": 0.03}]


@pytest.mark.fault("numbers", source="facebookresearch/higher#83")
@embedded
def test_the_momentum_trial_step_is_the_optimisers_of_every_parameter():
    """Biases and norms without decay, a predictor with a rate of its own."""
    cfg = method_config(
        optimizer__exclude_bias_n_norm_wd=True,
        method_kwargs__meta={"trial": "momentum"},
        **task_settings("simsiam"),
    )
    cfg.optimizer.weight_decay = 0.1
    torch.manual_seed(0)
    model = OwnRate(cfg)
    main = train(model, steps=1).optimizers[0]
    for module, step in zip((model.backbone, model.task), model.meta.inner_step(main)[:2]):
        params = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
        grads = {name: torch.randn_like(p) for name, p in params.items()}
        trial = step.step(params, grads)
        twin = copy.deepcopy(main.state_dict())
        for name, p in module.named_parameters():
            p.grad = grads.get(name)
        others = [
            p for g in main.param_groups for p in g["params"] if all(p is not q for q in module.parameters())
        ]
        for p in others:
            p.grad = None
        main.step()
        for name, p in module.named_parameters():
            if name in trial:
                torch.testing.assert_close(trial[name], p.detach(), msg=name)
        main.load_state_dict(twin)


@pytest.mark.fault("config", source="facebookresearch/higher#83")
def test_a_momentum_trial_step_that_is_not_the_optimisers_is_refused():
    cfg = method_config(
        optimizer__kwargs={"momentum": 0.9, "nesterov": True}, method_kwargs__meta={"trial": "momentum"}
    )
    with pytest.raises(UserError, match="optimizer.kwargs.nesterov must be left out with .*trial='momentum'"):
        train(MetaMask(cfg), steps=1)


@pytest.mark.fault(
    "numbers",
    source="Philip-Bachman/amdim-public#2, google-research/simclr#151, Lightning-AI/pytorch-lightning#4667",
)
@pytest.mark.parametrize(
    ("optimizer", "clipping"),
    [
        ("sgd", {}),
        ("sgd", {"gradient_clip_val": 0.1}),
        ("lars", {"gradient_clip_val": 0.1}),
        ("adamw", {"gradient_clip_val": 1e-3, "gradient_clip_algorithm": "value"}),
    ],
)
def test_labels_do_not_reach_the_encoder(monkeypatch, optimizer, clipping):
    """Not even through the gradients' common norm, by which clipping divides."""

    def trained(shift):
        class Shifted(Views):
            def __getitem__(self, index):
                number, views, label = super().__getitem__(index)
                return number, views, (label * shift + 1) % 10

        monkeypatch.setattr("method_training.Views", Shifted)
        torch.manual_seed(0)
        model = MetaMask(
            method_config(
                optimizer__name=optimizer,
                optimizer__kwargs={},
                method_kwargs__alpha=0.01,
                method_kwargs__redundancy__weight=0,
                method_kwargs__meta={"inner_lr": 0.1},
            )
        )
        start = model.classifier.weight.detach().clone()
        train(model, **clipping)
        assert not torch.equal(model.classifier.weight, start)
        return model.state_dict()

    first, second = trained(1), trained(3)
    differ = {name for name in first if not torch.equal(first[name], second[name])}
    assert differ == {"classifier.weight", "classifier.bias"}


@pytest.mark.fault("numbers", source="Lightning-AI/pytorch-lightning#4667")
def test_encoder_and_classifier_are_each_clipped_to_the_norm(monkeypatch):
    norms = []

    def measure(model):
        rest = [p for group in model.learnable_params for p in group["params"]]
        rest = [p for p in rest if all(p is not q for q in model.classifier.parameters())]
        groups = ([*model.classifier.parameters()], rest)
        norms.append([torch.stack([p.grad.norm() for p in group]).norm().item() for group in groups])

    def clip(self, *args, plain=Baseline.configure_gradient_clipping, **kwargs):
        measure(self)
        plain(self, *args, **kwargs)
        measure(self)

    monkeypatch.setattr(Baseline, "configure_gradient_clipping", clip)
    train(Baseline(baseline_config()), steps=1, gradient_clip_val=0.01)
    before, after = norms
    assert min(before) > 0.01 and after == pytest.approx([0.01, 0.01], rel=1e-3)


@pytest.mark.fault("numbers", source="pytorch/pytorch#112583, pytorch/pytorch#142234, pytorch/pytorch#65766")
@pytest.mark.parametrize("task", ["simsiam", "byol", "nnclr", "swav"])
def test_every_weight_has_a_gradient_under_autocast(task):
    """Autocast may hand out casts that were made under no_grad, and cut the graph."""
    missing = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            trained = [(n, p) for n, p in pl_module.named_parameters() if p.requires_grad]
            missing.extend(n for n, p in trained if p.grad is None or not p.grad.abs().sum() > 0)

    torch.manual_seed(0)
    model = MetaMask(method_config(**task_settings(task), method_kwargs__meta={"when": "before_step"}))
    train(model, steps=2, callbacks=[Look()], precision="bf16-mixed")
    assert not missing


@pytest.mark.fault("numbers", source="vturrisi/solo-learn#198")
@embedded
def test_accuracies_are_of_the_labelled_images():
    """STL-10's training images: one in twenty has a label."""

    class Labelled(Views):
        def __getitem__(self, index):
            number, views, _ = super().__getitem__(index)
            return number, views, 3 if index in (0, 8, 9, 10) else 5 if index == 1 else -1

    torch.manual_seed(0)
    model = Baseline(baseline_config(optimizer__classifier_lr=0.0))
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.eye(10)[3])
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.fit(model, DataLoader(Labelled(), batch_size=8))
    metrics = trainer.callback_metrics
    assert metrics["train_acc1"] == pytest.approx(80)
    chances = torch.eye(10)[3] - math.log(math.e + 9)
    assert metrics["train_class_loss"] == pytest.approx(-float(4 * chances[3] + chances[5]) / 5)


@pytest.mark.fault(
    "numbers",
    source="pytorch/pytorch#25162, Lightning-AI/pytorch-lightning#4732, Lightning-AI/pytorch-lightning#5060",
)
@embedded
@pytest.mark.parametrize("images", [1, 5, 7, 9])
def test_images_that_several_processes_repeat_count_once(images):
    model = Baseline(baseline_config()).eval()
    data = [(torch.randn(3, 32, 32), number) for number in range(images)]
    counted = []
    for rank in range(4):
        loader = DataLoader(data, batch_size=2, sampler=DistributedSampler(data, 4, rank, shuffle=False))
        model._trainer = SimpleNamespace(val_dataloaders=loader, sanity_checking=False)
        model.log_dict = lambda metrics, batch_size, **_: counted.append((metrics, batch_size))
        for number, batch in enumerate(loader):
            model.validation_step(batch, number)
    assert sum(size for _, size in counted) == images
    assert all(value.isfinite() for metrics, _ in counted for value in metrics.values())
    whole = model._classify(torch.stack([x for x, _ in data]), torch.arange(images))
    mean = sum(metrics["val_loss"] * size for metrics, size in counted) / images
    torch.testing.assert_close(mean, whole["loss"])


@pytest.mark.fault("config", source="d8ahazard/sd_dreambooth_extension#1415")
def test_a_target_network_in_16_bits_is_refused(tmp_path):
    """With m = 0.999, 1,000 steps move it by 2 % of the way in bfloat16, and should by 63 %."""
    small = config(tmp_path, "precision=bf16-true", "task=byol")
    expected = "precision must be 32-true or bf16-mixed for the task byol: .* got 'bf16-true'"
    with pytest.raises(UserError, match=expected):
        complete(small)
    complete(config(tmp_path, "precision=bf16-mixed", "task=byol"))


@pytest.mark.fault(
    "numbers", source="facebookresearch/moco#24, facebookresearch/moco#87, vturrisi/solo-learn#160"
)
@pytest.mark.parametrize(
    ("task", "setting", "size", "warned"),
    [
        ("moco", "queue_size", 65536, True),
        ("moco", "queue_size", 48, False),
        ("simclr", "bank_size", 49, True),
        ("simclr", "bank_size", 0, False),
        ("cmc", "bank_size", 49, True),
        ("nnclr", "queue_size", 49, False),  # a support set, no negatives
        ("byol", None, None, False),
    ],
)
def test_a_queue_that_holds_an_images_own_past_is_said(task, setting, size, warned, capfd):
    """24 images of two views are 48 projections an epoch."""
    settings = task_settings(task)
    if setting is not None:
        settings["method_kwargs__task_kwargs"] = {**settings["method_kwargs__task_kwargs"], setting: size}
    train(Baseline(baseline_config(**settings)), steps=3)
    out = capfd.readouterr().out
    said = f"warning: method_kwargs.task_kwargs.{setting}={size} holds projections of more than one epoch (24"
    assert (said in out) == warned and ("warning" in out) == warned


@pytest.mark.fault("numbers", source="learnables/learn2learn#174, learnables/learn2learn#271")
def test_the_exact_gradient_with_shared_and_with_frozen_weights(double):
    torch.manual_seed(0)
    shared = nn.Linear(6, 6)
    encoder = nn.Sequential(shared, nn.Tanh(), nn.Linear(6, 6).requires_grad_(False), nn.Tanh(), shared)
    function, head = Functional(encoder), Functional(nn.Linear(6, 4))
    assert set(function.params) == {"0.weight", "0.bias"}
    x = torch.randn(8, 6)

    def loss(h, phi, weights):
        z = nn.functional.normalize(head(phi, h * weights[0]), dim=1)
        return (z @ z.T).logsumexp(dim=1).mean()

    problem = BilevelProblem(
        encode=lambda theta: function(theta, x),
        inner_loss=loss,
        outer_loss=loss,
        encoder_params=function.params,
        head_params=head.params,
        outer_params=(torch.ones(6),),
    )
    trial = InnerStep(
        PlainStep(0.3, {"0.bias": 0.5}), MomentumStep(0.3, 0.9, {"weight": 0.1, "bias": 0.0}, {})
    )
    exact, unrolled = (
        estimator().gradient(problem, trial).outer_params[0] for estimator in (Exact, Unrolled)
    )
    torch.testing.assert_close(exact, unrolled, rtol=1e-10, atol=1e-14)
