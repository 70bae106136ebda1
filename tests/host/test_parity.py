"""The embedded host against solo-learn: the same config, seed and batches give the same training.

Parameter groups, learning rates, losses and weights are compared, bit by bit where the two run the same
operations. What differs on purpose is named here as it is in docs/solo_learn.md.
"""

import json
import os
import subprocess
import sys

import pytest
from solo_checkout import REPOSITORY, needs_solo_learn, under_solo

pytestmark = needs_solo_learn

STEPS = 20
TRIAL = {"method_kwargs__meta": {"inner_lr": 0.1}}
METHODS = {
    "metamask": ("method_config", TRIAL),
    "byol": ("baseline_config", {"method_kwargs__task": "byol"}),
    "icl_msr": ("icl_msr_config", TRIAL),
}
SGD = {"optimizer__name": "sgd", "optimizer__lr": 0.03}
ADAM = {"optimizer__name": "adam", "optimizer__kwargs": {}, "optimizer__lr": 0.002}
ADAMW = {**ADAM, "optimizer__name": "adamw"}
LARS = {
    "optimizer__name": "lars",
    "optimizer__lr": 0.5,
    "optimizer__kwargs": {"momentum": 0.9, "eta": 0.02, "clip_lr": True, "exclude_bias_n_norm": True},
}
COSINE = {"scheduler__name": "warmup_cosine", "scheduler__warmup_epochs": 2, "scheduler__min_lr": 1e-4}
BY_EPOCH = {**COSINE, "scheduler__interval": "epoch"}
STEP = {"scheduler__name": "step", "scheduler__lr_decay_steps": [1, 3]}
SPLIT = {"optimizer__exclude_bias_n_norm_wd": True}
SMALL = {"backbone__kwargs": {"width": 8}}
RESNET = {**SGD, **COSINE, "backbone__name": "resnet18"}
# name: method, epochs that the 20 steps are divided into, changes to the config
CASES = {
    **{
        f"{method}-{name}": (method, 5, {**optimizer, **COSINE})
        for method in METHODS
        for name, optimizer in (("sgd", SGD), ("adam", ADAM), ("lars", LARS))
    },
    "adamw": ("metamask", 5, {**ADAMW, **COSINE}),
    "resnet18": ("byol", 2, {**RESNET, "data__dataset": "custom"}),
    "resnet18 on cifar": ("byol", 2, {**RESNET, "data__dataset": "cifar10"}),
    "by epoch": ("metamask", 5, {**SGD, **BY_EPOCH}),
    "one epoch of warm-up": ("byol", 5, {**SGD, **BY_EPOCH, "scheduler__warmup_epochs": 1}),
    "warm-up to the end": ("byol", 5, {**SGD, **COSINE, "scheduler__warmup_epochs": 10}),
    "step": ("metamask", 5, {**SGD, **STEP}),
    "none": ("metamask", 5, SGD),
    "split": ("icl_msr", 5, {**SGD, **COSINE, **SPLIT}),
    "split lars": ("byol", 5, {**LARS, **COSINE, **SPLIT}),
    "lars on everything": ("byol", 5, {**LARS, "optimizer__kwargs": {"momentum": 0.9}}),
    "accumulated": ("metamask", 5, {**SGD, **COSINE, "accumulate_grad_batches": 2}),
    "no warm-up": ("byol", 5, {**SGD, **COSINE, "scheduler__warmup_epochs": 0}),
    "half a step of warm-up": ("byol", 5, {**SGD, **COSINE, "scheduler__warmup_epochs": 0.625}),
}

STEMS = {"resnet18": "imagenet", "resnet18 on cifar": "solo_cifar"}
"""What makes the embedded host's ResNet the one that solo-learn builds for that data set."""

TRAIN = """
import json, sys
sys.path.insert(0, "tests")
import lightning.pytorch as pl, torch
import method_config
from metamask_plugin import host
from metamask_plugin.methods import METHODS

torch.set_num_threads(1)


class Record(pl.Callback):
    def __init__(self):
        self.losses, self.rates = [], []

    def on_train_batch_start(self, trainer, model, batch, batch_idx):
        self.rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    def on_train_batch_end(self, trainer, model, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer, model):
        self.sums = [float(p.detach().double().sum()) for p in model.parameters()]


def train(config, overrides, epochs, steps):
    cfg = getattr(method_config, config)(crop_size=32, max_epochs=epochs, **overrides)
    # two LARS that round differently: in float32 ICL-MSR makes 1e-3 of it within 20 steps
    torch.set_default_dtype(torch.float64 if cfg.optimizer.name == "lars" else torch.float32)
    pl.seed_everything(5)
    model = METHODS[cfg.method](cfg)
    torch.manual_seed(6)  # whatever was drawn to build it
    generator = torch.Generator().manual_seed(0)
    accumulated = cfg.get("accumulate_grad_batches") or 1
    sizes = [pipeline.crop_size for pipeline in cfg.augmentations for _ in range(pipeline.num_crops)]
    batches = [
        [torch.arange(8), [torch.randn(8, 3, s, s, generator=generator) for s in sizes], torch.arange(8) % 10]
        for _ in range(steps * accumulated // epochs)]
    record = Record()
    trainer = pl.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, callbacks=[record],
        enable_progress_bar=False, enable_model_summary=False, accumulate_grad_batches=accumulated)
    trainer.fit(model, torch.utils.data.DataLoader(batches, batch_size=None))
    groups = [
        [g.get("name"), sum(p.numel() for p in g["params"]), len(g["params"]), g["weight_decay"]]
        for g in trainer.optimizers[0].param_groups]
    return {"groups": groups, "rates": record.rates, "losses": record.losses, "sums": record.sums,
            "steps": trainer.global_step}


cases, methods, steps, small, stems = json.loads(sys.argv[1])
for name, (method, epochs, changes) in cases.items():
    config, own = methods[method]
    if "backbone__name" not in changes:
        changes = {**changes, **small}
    elif host.name == "embedded":
        changes = {**changes, "backbone__kwargs": {"stem": stems[name]}}
    result = train(config, {**own, **changes}, epochs, 4 if name in stems else steps)
    print("RESULT", json.dumps({"name": name, "host": host.name, **result}))
"""


@pytest.fixture(scope="module")
def trained():
    """What either host recorded of each case: ``trained[host][case]``."""
    command = ["-c", TRAIN, json.dumps([CASES, METHODS, STEPS, SMALL, STEMS])]
    environment = {**os.environ, "METAMASK_HOST": "embedded", "PYTHONPATH": str(REPOSITORY)}
    embedded = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=REPOSITORY
    )
    found = {}
    for done in (embedded, under_solo(*command)):
        assert done.returncode == 0, done.stderr[-3000:]
        for line in done.stdout.splitlines():
            if line.startswith("RESULT "):
                result = json.loads(line.removeprefix("RESULT "))
                found.setdefault(result["host"], {})[result["name"]] = result
    return found


LARS_CASES = [name for name in CASES if "lars" in name]
OWN_RATES = ("no warm-up", "half a step of warm-up")
EXACT = [name for name in CASES if name not in (*LARS_CASES, *OWN_RATES)]


@pytest.mark.parametrize("name", EXACT)
def test_the_same_training(trained, name):
    ours, theirs = trained["embedded"][name], trained["solo"][name]
    assert ours["groups"] == theirs["groups"]
    assert ours["steps"] == theirs["steps"]
    # solo-learn multiplies from step to step what is one product here
    for rates, expected in zip(ours["rates"], theirs["rates"], strict=True):
        assert rates == pytest.approx(expected, rel=1e-12)
    assert len(theirs["losses"]) >= 4 and theirs["losses"][0] != theirs["losses"][-1]
    assert ours["losses"] == theirs["losses"]
    assert ours["sums"] == theirs["sums"]


@pytest.mark.parametrize("name", LARS_CASES)
def test_lars_is_the_same_up_to_rounding(trained, name):
    """timm's LARS has one switch for a group where solo-learn's asks each parameter: more groups."""
    ours, theirs = trained["embedded"][name], trained["solo"][name]
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-10)
    sizes = {}
    for host in (ours, theirs):
        for group, count, *_ in host["groups"]:
            key = (host["host"], group.removesuffix("_no_decay"))
            sizes[key] = sizes.get(key, 0) + count
    assert {count for (host, _), count in sizes.items() if host == "embedded"} == {
        count for (host, _), count in sizes.items() if host == "solo"
    }
    assert [rates[0] for rates in ours["rates"]] == pytest.approx([rates[0] for rates in theirs["rates"]])


def test_without_warm_up_solo_learn_trains_the_classifier_at_the_encoders_rate(trained):
    ours, theirs = (trained[host]["no warm-up"]["rates"] for host in ("embedded", "solo"))
    assert theirs[0] == [0.03, 0.03, 0.03] and ours[0] == pytest.approx([0.03, 0.1, 0.03])
    for rates, expected in zip(ours, theirs, strict=True):
        assert [rates[0], rates[2]] == pytest.approx([expected[0], expected[2]], rel=1e-12)
    assert trained["embedded"]["no warm-up"]["losses"][0] == trained["solo"]["no warm-up"]["losses"][0]


def test_a_warm_up_that_ends_between_steps_overshoots_in_solo_learn(trained):
    ours, theirs = (
        [rates[0] for rates in trained[host]["half a step of warm-up"]["rates"]]
        for host in ("embedded", "solo")
    )
    assert ours[:2] == pytest.approx(theirs[:2])
    assert max(ours) == pytest.approx(0.03) and max(theirs) == pytest.approx(0.03 * 4 / 3, rel=1e-3)


COMPARE_LARS = """
import torch
from solo.utils.lars import LARS
from metamask_plugin.host.optimizers import build_optimizer

generator = torch.Generator().manual_seed(0)
shapes = {"matrix": (4, 3), "bias": (4,), "scalar": (), "zero weight": (3, 3), "zero gradient": (3, 3)}
start = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
start["zero weight"].zero_()
for exclude in (False, True):
    for clip in (False, True):
        for decay in (0.0, 0.01):
            kwargs = {"momentum": 0.9, "eta": 0.02, "clip_lr": clip, "exclude_bias_n_norm": exclude}
            ours, theirs = ({n: torch.nn.Parameter(v.clone()) for n, v in start.items()} for _ in "ab")
            optimizers = (
                build_optimizer("lars", [{"params": list(ours.values())}], 0.5, decay, kwargs),
                LARS(list(theirs.values()), lr=0.5, weight_decay=decay, **kwargs))
            for step in range(4):
                for name in shapes:
                    gradient = torch.randn(shapes[name], generator=generator) * (name != "zero gradient")
                    ours[name].grad, theirs[name].grad = gradient.clone(), gradient.clone()
                for optimizer in optimizers:
                    optimizer.step()
            differ = [n for n in shapes if not torch.allclose(ours[n], theirs[n], rtol=1e-5, atol=1e-6)]
            kept = torch.equal(theirs["zero gradient"], start["zero gradient"])
            shrunk = bool((ours["zero gradient"].abs() < start["zero gradient"].abs()).all())
            print("RESULT", [decay, differ, kept, shrunk])
"""


def test_timms_lars_differs_only_where_a_gradient_is_zero():
    """There timm decays the weight at the full learning rate, and solo-learn leaves it."""
    done = under_solo("-c", COMPARE_LARS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [line.removeprefix("RESULT ") for line in done.stdout.splitlines() if line.startswith("RESULT")]
    assert found == ["[0.0, [], True, False]", "[0.01, ['zero gradient'], True, True]"] * 4
