"""Floating-point work, and what time is spent on."""

import pytest
import torch
from breakdown import KINDS, _kind, count_flops, matrix_peak, time_by_kind
from common import build_model, noise_views
from iterations import meta_settings
from loop import Loop
from peers import PEERS, UNIT


def test_flops_of_a_layer_forward_and_backward():
    layer, x = torch.nn.Linear(8, 16), torch.randn(4, 8)
    assert count_flops(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 4 * 8 * 16  # x needs no gradient


def test_flops_of_the_meta_step_are_those_of_the_arithmetic():
    """F, one pass of the encoder over both views, against docs/performance.md."""
    views = noise_views(2, 16)

    def flops(**settings):
        overrides = {**meta_settings(settings), **({} if settings else PEERS[UNIT])}
        return count_flops(Loop(build_model("resnet18", 16, **overrides), views).step)

    model = build_model("resnet18", 16)
    forward = count_flops(lambda: [model.backbone(x) for x in views])
    plain = flops()
    # the first convolution's input needs no gradient; heads are small against the encoder, though not nothing
    assert plain / forward == pytest.approx(3, rel=0.12)
    meta = flops(when="after_step") - plain
    assert meta / forward == pytest.approx(8, rel=0.05)
    assert (flops(when="before_step") - plain) / forward == pytest.approx(7, rel=0.05)
    assert (flops(trial_on="heads") - plain) / forward == pytest.approx(1, rel=0.25)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
            "elementwise",
        ),
        ("void cudnn::bn_fw_tr_1C11_kernel_NCHW<float>", "batch norm"),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix product"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("void at::native::(anonymous namespace)::multi_tensor_apply_kernel<...>", "optimiser"),
        ("triton_poi_fused_relu_0", "compiled elementwise"),
        ("triton_red_fused__native_batch_norm_legit_functional_1", "batch norm"),
        ("aten::mkldnn_convolution", "convolution"),
        ("aten::addmm", "matrix product"),
        ("aten::native_batch_norm_backward", "batch norm"),
        ("aten::threshold_backward", "elementwise"),
        ("aten::sum", "reduction"),
        ("something_else", "other"),
    ],
)
def test_kinds_of_kernels_and_operators(name, kind):
    assert _kind(name) == kind and kind in {*KINDS, "other"}


def test_time_by_kind_adds_up():
    layer, x = torch.nn.Conv2d(3, 32, 3), torch.randn(8, 3, 32, 32)
    found = time_by_kind(lambda: layer(x).relu().sum().backward())
    assert sum(found["seconds"].values()) == pytest.approx(found["wall_seconds"], rel=0.05)
    assert found["seconds"]["convolution"] > 0 and len(found["longest"]) <= 10


def test_matrix_peak_is_a_rate():
    assert matrix_peak(torch.float32, side=64, rounds=3) > 1e6
