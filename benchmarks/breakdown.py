"""Floating-point work of a step, the machine's matrix peak, and what a step's time is spent on."""

import re
import statistics
from collections.abc import Callable
from typing import Any

import torch
from common import device, seconds
from torch.utils.flop_counter import FlopCounterMode

KINDS = {
    "copy": r"memcpy|memset|copy|nchwtonhwc|nhwctonchw|_cat|catarray|clone|contiguous|stack|::cat|fill|zero",
    "optimiser": r"multi_tensor|foreach|fused_sgd|fused_adam",
    "batch norm": r"batch_?norm|bn_fw|bn_bw|bnorm|native_norm",
    "convolution": r"conv|xmma|implicit|dgrad|wgrad|fprop|winograd|mkldnn|cudnn",
    "matrix product": r"gemm|gemv|cutlass|cublas|::(add)?mm|::bmm|nvjet",
    "compiled elementwise": r"triton_poi",
    "compiled reduction": r"triton_(red|per)",
    "reduction": r"reduce|softmax|::(sum|mean|norm|var|linalg)|cross_entropy|nll|logsumexp",
    "elementwise": r"elementwise|vectorized|::(add|mul|div|sub|relu|threshold|where|exp|pow|sqrt|neg|eq|lt)",
}
"""Kinds of kernels (CUDA) or operators (CPU), by a pattern of their names; the first that fits counts."""


def count_flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of one call, of matrix products and convolutions: 2 a multiply-add.

    Not of compiled code, into which the counter does not see.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def matrix_peak(dtype: torch.dtype = torch.bfloat16, side: int | None = None, rounds: int = 10) -> float:
    """FLOP/s of one large square matrix product on this machine, the median: what a step is held against."""
    side = side or (8192 if torch.cuda.is_available() else 1024)
    a, b = (torch.randn(side, side, device=device()).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * side**3 / statistics.median(seconds(lambda: a @ b) for _ in range(rounds))


def time_by_kind(call: Callable[[], Any], calls: int = 3) -> dict[str, Any]:
    """Where the time of ``call`` goes: seconds by kind, the ten longest kernels or operators, and idle time.

    On CUDA the kernels' own time, idle being what is left of the wall time; on the CPU the operators' own
    time, and the rest is that of Python and autograd. The profiler slows the host down: on CUDA the wall time
    is that of the same calls without it.
    """
    cuda = torch.cuda.is_available()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    call()
    unprofiled = seconds(call, calls)
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        profiled = seconds(call, calls)
    wall = unprofiled if cuda else profiled
    own: dict[str, float] = {}
    for event in profile.key_averages():
        if getattr(event, "is_user_annotation", False) or event.key.startswith(
            ("ProfilerStep", "Optimizer.")
        ):
            continue
        if cuda and event.device_type != torch.autograd.DeviceType.CUDA:
            continue
        micro = event.self_device_time_total if cuda else event.self_cpu_time_total
        own[event.key] = own.get(event.key, 0.0) + micro / 1e6 / calls
    kinds: dict[str, float] = {}
    for name, spent in own.items():
        kinds[_kind(name)] = kinds.get(_kind(name), 0.0) + spent
    kinds["idle" if cuda else "python"] = max(0.0, wall - sum(own.values()))
    longest = sorted(own.items(), key=lambda item: -item[1])[:10]
    return {
        "wall_seconds": wall,
        "seconds": dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "longest": {name[:120]: spent for name, spent in longest},
    }


def _kind(name: str) -> str:
    return next((kind for kind, form in KINDS.items() if re.search(form, name, re.IGNORECASE)), "other")
