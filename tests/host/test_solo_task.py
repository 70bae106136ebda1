"""Any solo-learn method as a task: exact meta-gradients, and trained alone it is solo-learn's method."""

import copy
import sys

import pytest
import torch
from method_config import baseline_config, icl_msr_config, method_config
from method_training import train
from omegaconf import OmegaConf
from solo_checkout import ROOT, needs_solo_learn

from metamask_plugin.bilevel import Exact, InnerStep, PlainStep, Unrolled
from metamask_plugin.errors import UserError
from metamask_plugin.host.solo_settings import NOT_TASKS, SETTINGS, WITH_MSR, is_solo_task, own_settings
from metamask_plugin.methods import ICLMSR, Baseline, MetaMask

pytestmark = [
    *needs_solo_learn,
    pytest.mark.filterwarnings("ignore"),  # solo-learn's own
]
TRIAL = InnerStep(PlainStep(0.05), PlainStep(0.05))
SMALL = {"queue_size": 24, "num_prototypes": 10, "pred_hidden_dim": 12, "whitening_size": 8}
OWN = {
    "deepclusterv2": {"num_prototypes": [10, 10]},
    "swav": {"epoch_queue_starts": 0, "freeze_prototypes_epochs": 0},
    "wmse": {"proj_output_dim": 4},
    "dino": {"freeze_last_layer": 0},
}


@pytest.fixture(autouse=True, scope="module")
def importable():
    """solo-learn behind all else on the path: which host is in use is decided already."""
    sys.path.append(str(ROOT))
    yield
    sys.path.remove(str(ROOT))


def settings(name, **more):
    """Overrides that put a small ``solo:<name>`` into a config."""
    small = {key: value for key, value in SMALL.items() if key in SETTINGS[name]}
    kwargs = {"proj_hidden_dim": 24, "proj_output_dim": 16, **small, **OWN.get(name, {}), **more}
    return {"method_kwargs__task": f"solo:{name}", "method_kwargs__task_kwargs": kwargs}


def build(constructor, config, name, **overrides):
    torch.manual_seed(0)
    if constructor is MetaMask:  # Eq. (5)'s alpha is for a contrastive loss; VICReg's weights are 25 already
        overrides["method_kwargs__alpha"] = 0.1
    return constructor(config(**settings(name), optimizer__lr=0.005, **overrides))


def running(model):
    """The model after two iterations: queues, memory banks and target networks are off their start."""
    if model.task.name == "deepclusterv2":  # its clusters come with the second epoch
        train(model.float(), steps=2, max_epochs=1)
        method = model.task.method
        method.assignments = torch.randint(0, 10, method.assignments.shape)
    else:
        train(model.float(), steps=2)
    return model.double()


def relative_error(problem):
    truth, exact = (estimator().gradient(problem, TRIAL).outer_params[0] for estimator in (Unrolled, Exact))
    assert truth.norm() > 0 and torch.isfinite(truth).all()
    return ((exact - truth).norm() / truth.norm()).item()


def test_every_method_of_solo_learn_is_a_task_or_says_why_not():
    from solo.methods import METHODS

    assert {*SETTINGS, *NOT_TASKS} == {*METHODS} - {"bare", "baseline", "metamask", "icl_msr"}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_exact_equals_unrolled(double, name):
    torch.set_default_dtype(torch.float32)
    model = running(
        build(MetaMask, method_config, name, method_kwargs__meta__enabled=name != "deepclusterv2")
    )
    torch.set_default_dtype(torch.float64)
    model.mask.weight.data += 0.3 * torch.randn_like(model.mask.weight)
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    model.task.before_batch(torch.arange(8), torch.arange(8) % 3, 0)
    before, rng = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert relative_error(model.meta_problem(views)) < 1e-9
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", WITH_MSR)
def test_icl_msr_exact_equals_unrolled(double, name):
    model = build(ICLMSR, icl_msr_config, name, method_kwargs__gamma=0.0).double()
    views = [torch.randn(8, 3, 32, 32) for _ in range(2)]
    weights = torch.sigmoid(2 * torch.randn(8, 3, model.features_dim))
    assert relative_error(model.meta_problem(views, weights)) < 1e-9


def test_icl_msr_refuses_what_it_is_not_defined_for():
    model = build(ICLMSR, icl_msr_config, "byol")
    with pytest.raises(UserError, match="solo:barlow_twins.*for ICL-MSR, got 'solo:byol'.*own task"):
        train(model, steps=1, original=True)


# deepclusterv2: all images are of no cluster in the first epoch, and the mean over none of them is NaN
# vibcreg: with its IterNorm, which has no second derivative
@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_alone_it_is_solo_learns_method_bit_for_bit(name):
    from solo.methods import METHODS

    own = {"method_kwargs__task_kwargs__iternorm": True} if name == "vibcreg" else {}
    ours = build(Baseline, baseline_config, name, max_epochs=2, **own)
    theirs = METHODS[name](ours.task.method.cfg)
    start = copy.deepcopy(ours.state_dict())
    heads = "task.step.method."
    state = {key.removeprefix(heads): value for key, value in start.items()}
    targets = {
        key: state[key.removeprefix("momentum_")] for key in theirs.state_dict() if "momentum_b" in key
    }
    classifier = {key: state[key] for key in ("classifier.weight", "classifier.bias")}
    theirs.load_state_dict(
        {**{key: state.get(key) for key in theirs.state_dict()}, **targets, **classifier}, strict=True
    )
    theirs.no_channel_last = ours.no_channel_last
    losses = {}
    for model in (ours, theirs):
        torch.manual_seed(1)
        steps = losses.setdefault(model, [])
        step = model.training_step
        model.training_step = lambda *args, step=step, steps=steps: _recorded(step(*args), steps)
        train(model, steps=3, max_epochs=2)
    assert losses[ours] == losses[theirs] or name == "deepclusterv2"
    trained = {key.removeprefix(heads): value for key, value in ours.state_dict().items()}
    for key in list(trained):
        trained[key.replace("task.target.trunk", "momentum_backbone")] = trained[key]
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(trained[key], value, rtol=0, atol=0, equal_nan=True, msg=key)


def _recorded(loss, into):
    into.append(loss.item())
    return loss


@pytest.mark.parametrize("name", ["nnclr", "mocov2plus", "dino", "swav"])
def test_the_meta_step_changes_nothing_of_the_method(name):
    """Queue, centre and target network move once an iteration, with the meta step and without."""
    states = []
    for enabled in (True, False):
        model = build(MetaMask, method_config, name, method_kwargs__meta__enabled=enabled)
        if enabled:
            model.meta.step = lambda main: None  # the mask stays, so all else must be the same
        train(model, steps=3)
        states.append(model.state_dict())
    for key, value in states[1].items():
        assert torch.equal(value, states[0][key]), key


def test_labels_reach_the_loss():
    model = build(Baseline, baseline_config, "supcon")
    feats = [torch.randn(8, model.features_dim) for _ in range(2)]
    model.task.before_batch(torch.arange(8), torch.arange(8), 0)
    distinct = model.task.loss(feats)
    model.task.before_batch(torch.arange(8), torch.arange(8) % 2, 0)
    assert not torch.equal(model.task.loss(feats), distinct)


def test_a_run_goes_on_where_it_was_interrupted(tmp_path):
    """SwAV's queue is made when training starts, and must not be made anew."""
    import lightning.pytorch as pl

    whole = build(MetaMask, method_config, "swav", max_epochs=2)
    train(whole, steps=3, max_epochs=2)

    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, model):
            trainer.save_checkpoint(tmp_path / "last.ckpt")
            trainer.should_stop = True

    first, second = (build(MetaMask, method_config, "swav", max_epochs=2) for _ in range(2))
    train(first, steps=3, max_epochs=2, callbacks=[Stop()])
    assert first.task.method.queue.abs().sum() > 0
    train(second, steps=3, max_epochs=2, checkpoint=tmp_path / "last.ckpt")
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_settings_are_solo_learns_under_the_users():
    cfg = method_config(**{**settings("byol"), "method_kwargs__task_kwargs": {"proj_output_dim": 32}})
    own = own_settings(cfg)
    assert (own.proj_hidden_dim, own.pred_hidden_dim, own.proj_output_dim) == (4096, 4096, 32)
    assert own.momentum == {"base_tau": 0.99, "final_tau": 1.0, "classifier": False}
    assert is_solo_task("solo:byol") and not is_solo_task("byol") and not is_solo_task(None)
    assert OmegaConf.to_container(own_settings(method_config(**settings("dino")))["momentum"]) == {
        "base_tau": 0.9995,
        "final_tau": 1.0,
        "classifier": False,
    }


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("nnclr", {"queue_size": 20}, "queue_size must be a multiple of the batch size 8, got 20"),
        ("wmse", {"whitening_size": 3}, "whitening_size must be a divisor of the batch size 8, got 3"),
        ("byol", {"momentum": {"base_tau": 2.0}}, "task_kwargs do not fit solo:byol"),
    ],
)
def test_settings_that_cannot_be_are_one_line(name, more, message):
    with pytest.raises(UserError, match=message) as error:
        Baseline(baseline_config(**settings(name, **more)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"), [("mae", "reconstructs pixels"), ("byal", "did you mean 'solo:byol'")]
)
def test_names_that_cannot_be_are_one_line(name, message):
    with pytest.raises(UserError, match=message):
        Baseline(baseline_config(method_kwargs__task=f"solo:{name}"))


def test_a_meta_step_needs_a_second_derivative():
    model = build(MetaMask, method_config, "vibcreg")
    model.task.method.cfg.method_kwargs.iternorm = True
    with pytest.raises(UserError, match="iternorm must be False"):
        model.task.check_meta_step(1)
    with pytest.raises(UserError, match="several processes"):
        model.task.check_meta_step(2)
