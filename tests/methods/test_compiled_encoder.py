"""``performance.compile``: the same training, no graph breaks, nothing compiled again after two steps."""

import copy
import warnings

import lightning.pytorch as pl
import pytest
import torch
from method_config import icl_msr_config, method_config
from method_training import train
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

from metamask_plugin.errors import UserError
from metamask_plugin.methods import ICLMSR, MetaMask, base
from metamask_plugin.modules.compiled import CompiledForward
from metamask_plugin.modules.encoders import build_encoder


@pytest.fixture
def traced(monkeypatch):
    """All of torch.compile but the code generation, which takes minutes on a CPU."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(
        base, "CompiledForward", lambda module, mode: CompiledForward(module, mode, "aot_eager")
    )
    yield
    torch._dynamo.reset()


class Graphs(pl.Callback):
    """How many graphs have been compiled by the end of each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, *args):
        self.seen.append(counters["stats"]["unique_graphs"])


def build(msr=False, backbone="conv4", size=32, **overrides):
    torch.manual_seed(0)
    constructor, config = (ICLMSR, icl_msr_config) if msr else (MetaMask, method_config)
    return constructor(config(backbone, size, optimizer__lr=1e-3, **overrides))


# the encoders of the shipped configs
@pytest.mark.parametrize(
    ("backbone", "size", "msr"),
    [
        ("conv4", 32, False),
        ("conv4", 32, True),
        ("conv", 32, False),
        ("conv", 32, True),
        pytest.param("resnet18", 32, False, marks=pytest.mark.slow),
        pytest.param("resnet18", 32, True, marks=pytest.mark.slow),
    ],
)
def test_nothing_breaks_and_nothing_is_compiled_again(traced, backbone, size, msr):
    graphs = Graphs()
    model = build(msr, backbone, size, performance__compile=True)
    train(model, steps=3, callbacks=[graphs], original=msr)
    assert not counters["graph_break"]
    # the regular step's and, with trial weights in place of the parameters, the meta step's
    assert graphs.seen == [0, 2, 2] and counters["stats"]["unique_graphs"] == 2


@pytest.mark.parametrize("msr", [False, True])
def test_it_is_the_same_training(traced, msr):
    plain, compiled = build(msr), build(msr, performance__compile=True)
    for model in (plain, compiled):
        train(model, steps=2, original=msr)
    assert counters["stats"]["unique_graphs"] == 2
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_under_mixed_precision(traced):
    graphs = Graphs()
    model = build(performance__compile=True, method_kwargs__meta={"precision": "bf16"})
    train(model, steps=3, callbacks=[graphs], precision="bf16-mixed")
    assert graphs.seen == [0, 2, 2] and not counters["graph_break"]


def test_a_checkpoint_and_a_copy_know_nothing_of_it(traced):
    model = build(performance__compile=True)
    names = list(model.state_dict())
    train(model, steps=1)
    assert list(model.state_dict()) == names
    assert "forward" not in vars(model.backbone)
    copy.deepcopy(model.backbone)


def test_evaluation_and_pauses_are_not_compiled(traced):
    encoder = build_encoder("conv4", 32)
    compiled = CompiledForward(encoder, True, "aot_eager")
    x = torch.randn(4, 3, 32, 32)
    with compiled.paused():
        encoder(x)
    encoder.eval()(x)
    assert counters["stats"]["unique_graphs"] == 0
    encoder.train()(x)
    assert counters["stats"]["unique_graphs"] == 1
    compiled.remove()
    encoder(x[:2])
    assert counters["stats"]["unique_graphs"] == 1


def test_where_it_cannot_be_compiled_it_goes_on_without(traced):
    def broken(graph, inputs):
        raise RuntimeError("no compiler\nhere")

    encoder = build_encoder("conv4", 32)
    expected, x = copy.deepcopy(encoder), torch.randn(4, 3, 32, 32)
    CompiledForward(encoder, True, broken)
    with pytest.warns(UserWarning, match="Conv4 cannot be compiled here and goes on without: .*no compiler"):
        features = encoder(x)
    torch.testing.assert_close(features, expected(x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(x)
    assert issubclass(BackendCompilerFailed, torch._dynamo.exc.TorchDynamoException)


@pytest.mark.parametrize(
    ("key", "value"), [("compile", "faster"), ("matmul_precision", "low"), ("matmul_precision", True)]
)
def test_unknown_settings_are_refused(key, value):
    with pytest.raises(UserError, match=f"performance.{key} must be one of"):
        build(**{f"performance__{key}": value})


@pytest.mark.parametrize(("precision", "convolutions"), [("high", True), ("highest", False)])
def test_the_matmul_precision_is_that_of_the_training_alone(precision, convolutions):
    def now():
        return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    class Look(pl.Callback):
        def on_train_batch_start(self, *args):
            seen.append(now())

    seen, before = [], now()
    train(build(performance__matmul_precision=precision), steps=1, callbacks=[Look()])
    assert seen == [(precision, convolutions)] and now() == before


def test_a_shared_pass_is_not_compiled_and_the_others_are(traced):
    meta = {"method_kwargs__meta": {"when": "before_step", "every_n_steps": 2}}
    plain, compiled = build(**meta), build(**meta, performance__compile=True)
    for model in (plain, compiled):
        train(model, steps=3)
    assert counters["stats"]["unique_graphs"] == 2  # the plain regular step's, and the outer loss's
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(compiled.state_dict()[name], value, rtol=1e-4, atol=1e-5, msg=name)
