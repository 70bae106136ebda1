"""The trial step and the main optimiser; what is logged of it; which batch judges; several meta-gradients."""

import copy
import math
import re
import types

import lightning.pytorch as pl
import pytest
import timm.optim
import torch
from method_config import icl_msr_config, method_config, task_settings
from method_training import Views, train
from solo_checkout import needs_solo_learn, under_solo
from torch import nn

from metamask_plugin.bilevel import (
    AdamStep,
    Exact,
    HeadsOnly,
    InnerStep,
    MatchedStep,
    PlainStep,
    TrustRatioStep,
    Unrolled,
    inner_step,
)
from metamask_plugin.bilevel.inner_step import SHARE, rule_following
from metamask_plugin.errors import UserError
from metamask_plugin.host.optimizers import build_optimizer
from metamask_plugin.methods import ICLMSR, MetaMask
from metamask_plugin.methods.meta_step import MetaStep

ADAMW = {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "optimizer__kwargs": {}}
LARS = {"optimizer__name": "lars", "optimizer__lr": 0.3, "optimizer__kwargs": {"momentum": 0.9}}
OPTIMIZERS = {
    "sgd": ("sgd", {}),
    "adam": ("adam", {"betas": (0.0, 0.99)}),
    "adamw": ("adamw", {"betas": (0.0, 0.99), "eps": 1e-5}),
    "lars": ("lars", {"eta": 0.02}),
    "larc": ("lars", {"eta": 0.5, "clip_lr": True}),
    "lars without vectors": ("lars", {"eta": 0.02, "exclude_bias_n_norm": True}),
}


def build(msr=False, meta=None, **overrides):
    torch.manual_seed(0)
    constructor, config = (ICLMSR, icl_msr_config) if msr else (MetaMask, method_config)
    schedule = {"when": "after_step"} if msr else {}
    return constructor(config(**overrides, method_kwargs__meta={**schedule, **(meta or {})}))


def assert_follows(module, main, weight, clip=None):
    """The trial step is the one that the optimiser then makes with this gradient."""
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    step = rule_following(main, module, "adaptive")
    first = next(iter(params))  # stands for the encoder
    groups = [
        {n: t for n, t in tensors.items() if (n == first) == e} for e in (1, 0) for tensors in (params, grads)
    ]
    trial = InnerStep(step, step, weight, clip).at(groups[::2], groups[1::2])
    trial = {**trial.encoder.step(*groups[:2]), **trial.head.step(*groups[2:])}
    for name, p in module.named_parameters():
        p.grad = weight * grads[name]
    if clip is not None:
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    main.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(trial[name], p.detach(), rtol=1e-12, atol=1e-14, msg=name)


@pytest.mark.parametrize("clip", [None, 1.0, 1e6])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_adaptive_step_is_the_optimisers_momentum_aside(double, optimizer, clip):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    first, *others = module.parameters()
    name, kwargs = OPTIMIZERS[optimizer]
    groups = [{"params": [first], "lr": 0.03}, {"params": others}]
    main = build_optimizer(name, groups, 0.01, 0.0, kwargs)
    for weight in (1.0, 100.0, 100.0):
        assert_follows(module, main, weight, clip)


SOLO_LARS = """
import torch
from torch import nn
from solo.utils.lars import LARS
from metamask_plugin.bilevel import InnerStep
from metamask_plugin.bilevel.inner_step import rule_following

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
for kwargs in ({}, {"exclude_bias_n_norm": True}, {"clip_lr": True}):
    module = nn.Linear(5, 4)
    main = LARS(module.parameters(), lr=0.3, eta=0.02, **kwargs)
    params = {name: p.detach().clone() for name, p in module.named_parameters()}
    grads = {name: torch.randn_like(p) for name, p in params.items()}
    for name, p in module.named_parameters():
        p.grad = 10 * grads[name]
    step = rule_following(main, module, "adaptive")
    trial = InnerStep(step, step, 10.0).at((params, params), (grads, grads)).encoder.step(params, grads)
    main.step()
    for name, p in module.named_parameters():
        torch.testing.assert_close(trial[name], p.detach(), rtol=1e-12, atol=1e-14)
print("the same")
"""


@pytest.mark.parametrize("program", [pytest.param(SOLO_LARS, marks=needs_solo_learn, id="lars")])
def test_and_of_solo_learns_lars(program):
    done = under_solo("-c", program)
    assert done.stdout.endswith("the same\n"), done.stderr


def test_weight_decay_is_in_the_trust_ratio_and_no_part_of_the_step(double):
    torch.manual_seed(0)
    module, decay = nn.Linear(5, 4, bias=False), 0.1
    main = timm.optim.Lars(module.parameters(), lr=0.3, trust_coeff=0.02, weight_decay=decay)
    params = {"weight": module.weight.detach().clone()}
    grads = {"weight": torch.randn_like(module.weight)}
    module.weight.grad = grads["weight"].clone()
    trial = rule_following(main, module, "adaptive").at(params, grads).step(params, grads)
    main.step()
    w, g = params["weight"], grads["weight"]
    q = 0.02 * w.norm() / (g.norm() + decay * w.norm())
    torch.testing.assert_close(
        trial["weight"], module.weight.detach() + 0.3 * q * decay * w, rtol=1e-7, atol=0
    )


@pytest.mark.parametrize(
    ("overrides", "meta", "kind"),
    [
        ({}, {}, PlainStep),
        ({}, {"inner_lr": 0.2}, PlainStep),
        ({}, {"inner_lr": "auto"}, MatchedStep),
        ({}, {"trial": "adaptive"}, PlainStep),
        (ADAMW, {}, AdamStep),
        (ADAMW, {"inner_lr": 0.2}, PlainStep),
        (ADAMW, {"trial": "adaptive", "inner_lr": 0.2}, AdamStep),
        (ADAMW, {"trial": "plain", "inner_lr": "auto"}, MatchedStep),
        (LARS, {}, TrustRatioStep),
        (LARS, {"inner_lr": "auto"}, MatchedStep),
    ],
)
def test_which_trial_step_is_made(overrides, meta, kind):
    model = build(meta=meta, **overrides)
    trainer = train(model, steps=1)
    trial = model.meta.inner_step(trainer.optimizers[0], 2.0)
    follows = kind in (MatchedStep, AdamStep, TrustRatioStep) or meta.get("trial") == "adaptive"
    assert (trial.weight, trial.clip) == ((100.0, 2.0) if follows else (1.0, None))
    for step in trial[:2]:
        assert type(step) is kind
        wanted = meta.get("inner_lr")
        rate = trainer.optimizers[0].param_groups[0]["lr"] if wanted in (None, "auto") else wanted
        assert step.numbers[0] == rate
        if kind is MatchedStep:
            assert step.share == SHARE
    assert math.isfinite(trainer.callback_metrics["train_trial_gain"])


def test_an_adaptive_trial_step_is_that_of_the_weighted_loss():
    """L_task enters the regular loss times alpha * scale_loss; ICL-MSR's L_in is the regular loss itself."""
    weights = []
    for msr in (False, True):
        model = build(
            msr, **ADAMW, **({} if msr else {"method_kwargs__alpha": 20, "method_kwargs__scale_loss": 0.5})
        )
        gradient = model.meta.estimator.gradient
        model.meta.estimator.gradient = lambda problem, step, gradient=gradient: (
            weights.append(step.weight),
            gradient(problem, step),
        )[1]
        train(model, steps=1, original=msr)
    assert weights == [10.0, 1.0]


@pytest.mark.parametrize(
    ("overrides", "meta", "message"),
    [
        (
            ADAMW,
            {"trial": "plain"},
            r"inner_lr must be set for trial=plain when the main optimiser is AdamW: .*auto",
        ),
        (LARS, {"trial": "plain"}, r"inner_lr must be set for trial=plain when the main optimiser is Lars"),
        (
            ADAMW,
            {"trial": "momentum"},
            "trial must be plain when the main optimiser is AdamW, got 'momentum'",
        ),
        (
            {},
            {"trial": "momentum", "inner_lr": "auto"},
            r"inner_lr must be a number or null with another trial",
        ),
        ({}, {"inner_lr": "long"}, r"method_kwargs.meta.inner_lr must be >= 0, auto or null, got 'long'"),
        ({}, {"accumulate": 0}, r"method_kwargs.meta.accumulate must be >= 1, got 0"),
        (
            {},
            {"outer_batch": "last"},
            r"method_kwargs.meta.outer_batch must be one of next, same, got 'last'",
        ),
        (
            {},
            {"outer_batch": "next", "when": "before_step"},
            r"outer_batch must be same with when=before_step",
        ),
    ],
)
def test_what_cannot_be_is_said_in_a_line(overrides, meta, message):
    with pytest.raises(UserError, match=message):
        train(build(meta=meta, **overrides), steps=1)


def test_a_queue_that_holds_the_batch_before_cannot_be_judged_by_the_next():
    train(build(meta={"outer_batch": "next"}, **task_settings("byol")), steps=2)
    model = build(meta={"outer_batch": "next"}, **task_settings("nnclr"))
    with pytest.raises(UserError, match="same with a task that has a queue"):
        train(model, steps=2)


def test_clipping_by_value_is_no_shorter_step():
    clip = {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}
    with pytest.raises(UserError, match="algorithm must be norm with a trial step"):
        train(build(**ADAMW), steps=1, **clip)
    train(build(**ADAMW, meta={"inner_lr": 1e-3}), steps=1, **clip)
    model = build(**ADAMW)
    train(model, steps=1, gradient_clip_val=0.1)
    main = model.optimizers(use_pl_optimizer=False)
    assert model.meta.inner_step(main, 0.1)[2:] == (100.0, 0.1)


@pytest.mark.parametrize("msr", [False, True])
def test_a_training_says_what_its_trial_steps_gain(msr):
    metrics = train(build(msr, **ADAMW), steps=3, original=msr).callback_metrics
    for name in ("train_inner_loss", "train_outer_loss", "train_trial_gain", "meta_gradient_norm"):
        assert math.isfinite(metrics[name]), name
    assert 0 < metrics["train_trial_length"] < 1 and -1 <= metrics["meta_gradient_cosine"] <= 1
    if not msr:
        gain = metrics["train_inner_loss"] - metrics["train_outer_loss"]
        torch.testing.assert_close(metrics["train_trial_gain"], gain, rtol=1e-4, atol=1e-6)


def test_the_cosine_is_with_the_meta_gradient_before():
    model, seen = build(), []
    inner = model.meta.estimator.gradient
    model.meta.estimator.gradient = lambda *args: (seen.append(inner(*args)), seen[-1])[1]
    metrics = train(model, steps=3).callback_metrics
    (a, b, c) = (found.outer_params[0] for found in seen)
    cosines = [torch.cosine_similarity(*pair, dim=0) for pair in ((a, b), (b, c))]
    torch.testing.assert_close(metrics["meta_gradient_cosine"], sum(cosines) / 2)
    torch.testing.assert_close(metrics["meta_gradient_norm"], sum(g.norm() for g in (a, b, c)) / 3)


@pytest.mark.parametrize(
    ("gain", "epoch", "meta", "remedy"),
    [
        (
            -0.5,
            1,
            {"inner_lr": 0.1},
            r"set method_kwargs.meta.inner_lr=auto, or method_kwargs.meta.inner_lr=null ",
        ),
        (
            -0.5,
            1,
            {"inner_lr": 0.1, "trial": "adaptive"},
            r"or set method_kwargs.meta.inner_lr=auto method_kwargs.meta.trial=plain$",
        ),
        (-0.5, 1, {"inner_lr": "auto"}, r"set method_kwargs.meta.inner_lr=1e-3$"),
        (
            -0.5,
            1,
            {},
            r"lower optimizer.lr, or give it a length of its own: method_kwargs.meta.inner_lr=1e-3",
        ),
        (-0.001, 2, {}, "lower optimizer.lr"),
        (0.5, None, {}, None),
    ],
)
def test_a_trial_step_that_overshoots_is_told_once(capsys, gain, epoch, meta, remedy):
    model = build(meta=meta)
    inner = model.meta.estimator.gradient
    model.meta.estimator.gradient = lambda *args: inner(*args)._replace(gain=torch.tensor(gain))
    train(model, steps=2, max_epochs=3)
    lines = [line for line in capsys.readouterr().out.splitlines() if "trial step" in line]
    assert len(lines) == (remedy is not None)
    for line in lines:
        assert line.startswith(
            f"warning: in epoch {epoch} the trial step raised the loss that it is to lower, by "
        )
        assert re.search(remedy, line)


@pytest.mark.parametrize("msr", [False, True])
@pytest.mark.parametrize("task", ["simclr", "byol"])
def test_the_next_batch_can_judge(double, task, msr):
    """Exact still; and with the same images again it is the ordinary problem."""
    model = build(msr, **task_settings(task))
    first, second = ([torch.randn(6, 3, 32, 32) for _ in range(2)] for _ in range(2))
    more = (model.regularizer(torch.randn(6, 3, 36, 36)).detach(),) if msr else ()
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))

    def gradient(estimator, outer):
        return estimator.gradient(model.meta_problem(first, *more, outer=outer), trial)

    exact, oracle = (gradient(estimator, (second, None)) for estimator in (Exact(), Unrolled()))
    same, ordinary = gradient(Exact(), (first, None)), gradient(Exact(), None)
    for ours, theirs in ((exact, oracle), (same, ordinary)):
        torch.testing.assert_close(ours.outer_params, theirs.outer_params, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(ours[1:], theirs[1:], rtol=1e-9, atol=1e-12)
    assert not torch.allclose(exact.outer_params[0], ordinary.outer_params[0], rtol=0.1)
    heads = gradient(Exact(), (second, None))
    frozen = HeadsOnly(Exact()).gradient(model.meta_problem(first, *more, outer=(second, None)), trial)
    assert not torch.allclose(frozen.outer_params[0], heads.outer_params[0], rtol=0.1)


@pytest.mark.parametrize("when", ["after_step", "epoch_end"])
def test_the_first_batch_of_an_epoch_has_none_before_it(when):
    model, calls = build(meta={"outer_batch": "next", "when": when}), []
    inner = model.meta.run

    def run(method, views, *more, outer=None):
        calls.append((views[0][0, 0, 0, 0].item(), outer[0][0][0, 0, 0, 0].item()))
        inner(method, views, *more, outer=outer)

    model.meta.run = run
    train(model, steps=3, max_epochs=2)
    first = [Views()[index][1][0][0, 0, 0].item() for index in (0, 8, 16)]
    assert calls == 2 * [(first[0], first[1]), (first[1], first[2])]
    assert not model.resumes_within_epoch and build().resumes_within_epoch


class OfEachStep(pl.Callback):
    def __init__(self):
        self.masks = []

    def on_train_batch_start(self, trainer, pl_module, *args):
        self.masks.append(pl_module.mask.values().clone())


def test_several_meta_gradients_make_one_step_on_their_mean():
    meta = {"optimizer": {"name": "sgd", "lr": 1.0}}
    model, watch, seen = build(meta={**meta, "accumulate": 2}), OfEachStep(), []
    inner = model.meta.estimator.gradient
    model.meta.estimator.gradient = lambda *args: (seen.append(inner(*args)), seen[-1])[1]
    train(model, steps=3, callbacks=[watch])
    assert torch.equal(watch.masks[0], watch.masks[1]) and not torch.equal(watch.masks[1], watch.masks[2])
    mean = (seen[0].outer_params[0] + seen[1].outer_params[0]) / 2
    torch.testing.assert_close(watch.masks[2], watch.masks[0] - mean)


def test_a_run_resumed_between_two_of_them_is_the_uninterrupted_one(tmp_path):
    """Three meta-gradients an epoch, and a step of each second one."""
    meta = {"accumulate": 2}
    whole, first, rest = (build(meta=meta, max_epochs=2, **ADAMW) for _ in range(3))
    metrics = train(whole, max_epochs=2).callback_metrics
    trainer = train(first, max_epochs=1)
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    resumed = train(rest, checkpoint=tmp_path / "first.ckpt", max_epochs=2)
    for name, value in rest.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    for name in ("meta_gradient_cosine", "train_trial_gain"):
        assert resumed.callback_metrics[name] == metrics[name], name


def test_a_checkpoint_from_before_is_gone_on_with(tmp_path):
    trainer = train(build(), max_epochs=1)
    trainer.save_checkpoint(tmp_path / "new.ckpt")
    content = torch.load(tmp_path / "new.ckpt", weights_only=False)
    del content["meta_gradients"]
    torch.save(content, tmp_path / "old.ckpt")
    model = build(max_epochs=2)
    train(model, checkpoint=tmp_path / "old.ckpt", max_epochs=2)
    assert model.meta.optimizer.state_dict()["state"][0]["step"] == 6


@pytest.mark.parametrize("overrides", [ADAMW, LARS])
def test_a_captured_meta_step_reads_the_optimisers_state(monkeypatch, graph_stand_in, overrides):
    def trained(captured):
        monkeypatch.setattr(MetaStep, "can_capture", lambda self, method: captured)
        model = build(scheduler__name="warmup_cosine", max_epochs=3, **overrides)
        train(model, 3, max_epochs=3)
        return model.state_dict()

    plain = trained(False)
    for name, value in trained(True).items():
        assert torch.equal(value, plain[name]), name


class StaticRates(MetaMask):
    @property
    def learnable_params(self):
        groups = super().learnable_params
        return [{**group, "static_lr": True} if group["name"] == "task" else group for group in groups]


def test_rates_that_move_against_each_other_are_not_captured(monkeypatch, graph_stand_in):
    """A predictor that keeps its rate, as SimSiam's, while the others' is scheduled."""

    def trained(captured):
        monkeypatch.setattr(MetaStep, "can_capture", lambda self, method: captured)
        settings = task_settings("simsiam")
        torch.manual_seed(0)
        model = StaticRates(method_config(scheduler__name="warmup_cosine", max_epochs=3, **settings))
        train(model, 3, max_epochs=3)
        return model.state_dict()

    plain = trained(False)
    for name, value in trained(True).items():
        assert torch.equal(value, plain[name]), name


def test_a_mask_starts_where_it_is_told_to():
    weights = torch.linspace(0.5, 1.5, 256).tolist()
    held = build(method_kwargs__mask={"start": weights}, meta={"enabled": False})
    start = copy.deepcopy(held.mask.values())
    train(held)
    torch.testing.assert_close(start, torch.tensor(weights))
    assert torch.equal(held.mask.values(), start)
    sigmoid = {"parameterisation": "sigmoid", "start": [0.25] * 256}
    torch.testing.assert_close(build(method_kwargs__mask=sigmoid).mask.values(), torch.full((256,), 0.25))
    for bad, message in (
        ({"start": [1.0]}, "of the encoder's 256 dimensions, got '1 weights'"),
        ({"parameterisation": "sigmoid", "start": weights}, "between 0 and 1 with parameterisation=sigmoid"),
    ):
        with pytest.raises(UserError, match=message):
            build(method_kwargs__mask=bad)


def test_a_single_batch_has_no_next(capsys):
    model = build(meta={"outer_batch": "next"})
    train(model, steps=1)
    assert torch.equal(model.mask.values(), torch.ones(256))
    assert "outer_batch=next makes no meta step" in capsys.readouterr().out


def test_a_fused_adam_is_not_asked_for_its_counts():
    """They are on its device: a device without numbers has none to tell."""
    module = nn.Linear(3, 2, device="meta")
    main = torch.optim.AdamW(module.parameters())
    for p in module.parameters():
        main.state[p] = {"step": torch.zeros((), device="meta"), "exp_avg_sq": torch.zeros_like(p)}
    step = rule_following(main, module, "adaptive")
    assert [torch.is_tensor(number) for number in step.numbers] == [False, True, True, False]


def test_counts_on_a_device_give_the_same_corrections(monkeypatch, double):
    steps = {"a": torch.tensor(4.0), "b": torch.tensor(0.0)}
    (host, ours), device = inner_step._corrections(steps, 0.9), types.SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.Tensor, "device", device)
    there, theirs = inner_step._corrections(steps, 0.9)
    monkeypatch.undo()
    for name in steps:
        assert float(there[theirs[name]]) == pytest.approx(host[ours[name]])
    assert there[-1] == host[-1]


def test_fewer_meta_gradients_than_one_step_is_the_mean_of(capsys):
    model = build(meta={"accumulate": 4})
    train(model, steps=3)
    assert torch.equal(model.mask.values(), torch.ones(256))
    assert "accumulate=4 makes no meta step in a run of 3 meta-gradients" in capsys.readouterr().out
