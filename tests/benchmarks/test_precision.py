"""TensorFloat-32 on a machine that has none, and errors measured with it."""

import pytest
import torch
from common import build_model, noise_views
from gradient_error import error_table, measure_errors
from precision import RoundedInputs, matrix_precision, rounded

from metamask_plugin.bilevel import InnerStep, PlainStep

cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has TensorFloat-32 itself")


def test_rounding_keeps_ten_bits_of_mantissa():
    last = 2.0**-10
    x = torch.tensor([1.0, 1 + last, 1 + 0.4 * last, 1 + 0.6 * last, -1 - 0.6 * last, 0.0])
    expected = torch.tensor([1.0, 1 + last, 1.0, 1 + last, -1 - last, 0.0])
    assert torch.equal(rounded(x), expected)
    assert torch.equal(rounded(1e30 * x), rounded(rounded(1e30 * x)))
    double = torch.rand(3, dtype=torch.float64)
    assert rounded(double) is double


def test_rounding_keeps_the_memory_layout():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert rounded(x).stride() == x.stride()


@pytest.mark.parametrize("layer", [torch.nn.Conv2d(3, 4, 3), torch.nn.Linear(3, 4)])
def test_forward_and_backward_passes_round_what_they_multiply(layer):
    x = torch.randn(2, 3, 5, 5) if isinstance(layer, torch.nn.Conv2d) else torch.randn(2, 3)
    cotangent = torch.randn_like(layer(x))

    def passes(context):
        inputs = x.clone().requires_grad_()
        with context:
            out = layer(inputs)
            return out.detach(), *torch.autograd.grad(out, [inputs, layer.weight], cotangent)

    plain, emulated = passes(matrix_precision("float32")), passes(RoundedInputs())
    for ours, exact in zip(emulated, plain):
        error = ((ours - exact).norm() / exact.norm()).item()
        assert 1e-5 < error < 2e-3  # half a unit in the tenth bit is 5e-4


@cpu_only
def test_meta_gradient_errors_grow_as_precision_falls():
    torch.manual_seed(0)
    model = build_model("conv4", 16)
    batches = noise_views(6, 16), noise_views(6, 16)
    trial = InnerStep(PlainStep(0.1), PlainStep(0.1))
    found = measure_errors(model, *batches, trial, ["float32", "tf32", "bf16"])
    exact = {name: cell.get("relative") for name, cell in found["estimators"]["exact"].items()}
    assert exact["float64"] < 1e-10 < exact["float32"] < exact["tf32"] < exact["bf16"] < 1
    assert found["estimators"]["unrolled"]["float64"]["relative"] == 0
    assert found["estimators"]["first order"]["float64"]["cosine"] < 0.95
    assert abs(found["cosine_between_batches"]) < 0.5
    assert model.meta.cfg.precision == "full"  # the model is left as it was
    assert len(error_table(found).splitlines()) == 2 + len(found["estimators"])
