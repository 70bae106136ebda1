"""The meta-gradient in a GPU's arithmetic."""

import copy

import pytest
import torch
from method_config import TASK_KWARGS, baseline_config, icl_msr_config, method_config, task_settings
from method_training import spoil_the_classifier, train

from metamask_plugin.bilevel import CudaGraph, Exact, InnerStep, PlainStep, Unrolled
from metamask_plugin.errors import NonFiniteError
from metamask_plugin.methods import METHODS
from metamask_plugin.tasks import TASKS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TRIAL = InnerStep(PlainStep(0.1), PlainStep(0.1))


def problem(config, backbone="conv4", batch=8, dtype=torch.float64, **settings):
    """On the GPU; of the same weights and images in every precision."""
    torch.manual_seed(0)
    cfg = config(backbone, **settings)
    model = METHODS[cfg.method](cfg).to("cuda", dtype, memory_format=torch.channels_last)
    views = [torch.randn(batch, 3, 32, 32).to("cuda", dtype) for _ in range(2)]
    views = [x.to(memory_format=model.memory_format) for x in views]
    if config is method_config:
        return model.meta_problem(views)
    with torch.no_grad():
        return model.meta_problem(views, model.regularizer(torch.randn(batch, 3, 36, 36).to("cuda", dtype)))


def error(one, other):
    one, other = one.outer_params[0].double(), other.outer_params[0].double()
    return ((one - other).norm() / other.norm()).item()


@pytest.fixture
def tf32(request):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if request.param else "highest")
    torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("config", [method_config, icl_msr_config])
@pytest.mark.parametrize("task", TASK_KWARGS)
def test_exact_is_unrolled(config, task):
    torch.set_default_dtype(torch.float64)  # some tasks make tensors of their own
    try:
        one = problem(config, **task_settings(task))
        assert error(Exact().gradient(one, TRIAL), Unrolled().gradient(one, TRIAL)) < 1e-9
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("backbone", ["resnet18", "test_convnext", "test_vit"])
def test_exact_is_unrolled_through(backbone):
    one = problem(method_config, backbone)
    assert error(Exact().gradient(one, TRIAL), Unrolled().gradient(one, TRIAL)) < 1e-9


@pytest.mark.parametrize("tf32", [False, True], indirect=True)
@pytest.mark.parametrize("config", [method_config, icl_msr_config])
def test_float32_is_near(config, tf32):
    truth = Exact().gradient(problem(config), TRIAL)
    found = error(Exact().gradient(problem(config, dtype=torch.float32), TRIAL), truth)
    assert found < (0.3 if tf32 else 1e-3)  # TF32 on an H200: 0.12 for ICL-MSR
    print(f"{config.__name__}, TF32 {'on' if tf32 else 'off'}: relative error {found:.1e}")


@pytest.mark.parametrize("precision", ["full", "bf16"])
def test_the_gpus_gradient_is_the_cpus(precision):
    torch.manual_seed(0)
    cfg = method_config(method_kwargs__meta={"precision": precision})
    model = METHODS["metamask"](cfg)
    views = [torch.randn(32, 3, 32, 32) for _ in range(2)]
    trial = InnerStep(PlainStep(1e-3), PlainStep(1e-3))
    here = model.meta.estimator.gradient(model.meta_problem(views), trial)
    there = copy.deepcopy(model).cuda()
    found = there.meta.estimator.gradient(there.meta_problem([x.cuda() for x in views]), trial)
    assert found.outer_params[0].is_cuda and found.outer_params[0].dtype == torch.float32
    cosine = torch.cosine_similarity(found.outer_params[0].cpu(), here.outer_params[0], dim=0).item()
    assert cosine > (0.9999 if precision == "full" else 0.95)


def test_a_gradient_that_is_no_number_stops_the_run_a_look_later(monkeypatch):
    spoil_the_classifier(monkeypatch)
    model = METHODS["bare"](baseline_config())
    with pytest.raises(NonFiniteError, match=r"the gradient of classifier.weight in epoch 1, step 1"):
        train(model, 3, accelerator="gpu")
    assert not bool(model.classifier.weight.isfinite().all())  # one step was made with it


CAPTURED = [task for task in TASK_KWARGS if TASKS[task].capturable]


@pytest.mark.parametrize("config", [method_config, icl_msr_config])
@pytest.mark.parametrize("task", CAPTURED)
def test_a_replayed_meta_gradient_is_the_meta_gradient(config, task):
    """While weights, queues, targets, images and the trial step's length change."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    try:
        cfg = config(**task_settings(task))
        model = METHODS[cfg.method](cfg).cuda()
        for number in range(6):
            views = [torch.randn(8, 3, 32, 32, device="cuda") for _ in range(2)]
            views = [x.to(memory_format=model.memory_format) for x in views]
            more = [] if config is method_config else [torch.rand(8, 3, model.features_dim, device="cuda")]
            targets = model.target_features(views, keep_statistics=True)
            trial = InnerStep(PlainStep(0.1 / (number + 1)), PlainStep(0.2 / (number + 1)))
            w = more[0] if more else model.mask.values()
            found = model.meta._replayed(model, trial, views, w, targets, None)
            expected = model.meta.estimator.gradient(
                model.meta_problem(views, *more, target_feats=targets), trial
            )
            assert error(found, expected) < 1e-9
            assert found.outer_loss.item() == pytest.approx(expected.outer_loss.item(), rel=1e-9)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.1)
                projections = [model.task.project(model.backbone(x)) for x in views]
                model.task.after_batch(projections, None if targets is None else projections)
        assert model._graph.graph is not None
    finally:
        torch.set_default_dtype(torch.float32)


SCHEDULED = {"scheduler__name": "warmup_cosine", "max_epochs": 3}
OPTIMIZERS = {
    "SGD": {},
    "momentum": {"method_kwargs__meta": {"trial": "momentum"}},
    "AdamW": {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "optimizer__kwargs": {}},
    "fused AdamW": {"optimizer__name": "adamw", "optimizer__lr": 1e-3, "optimizer__kwargs": {"fused": True}},
    "LARS": {"optimizer__name": "lars", "optimizer__lr": 0.3, "optimizer__kwargs": {"momentum": 0.9}},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_captured_training_is_the_plain_one(monkeypatch, optimizer):
    """Rates, moments and counts of steps change between the replays; in float64, where little else does."""
    captures, capture = [], CudaGraph._capture
    monkeypatch.setattr(CudaGraph, "_capture", lambda self, args: captures.append(1) or capture(self, args))

    def trained(captured):
        torch.manual_seed(0)
        model = METHODS["metamask"](method_config(**SCHEDULED, **OPTIMIZERS[optimizer]))
        model.meta.can_capture = lambda method: captured
        train(model, 3, accelerator="gpu", precision="64-true", max_epochs=3)
        return {name: value.cpu() for name, value in model.state_dict().items()}

    plain = trained(False)
    for name, value in trained(True).items():
        torch.testing.assert_close(value, plain[name], rtol=1e-6, atol=1e-9, msg=name)
    assert len(captures) == 1
