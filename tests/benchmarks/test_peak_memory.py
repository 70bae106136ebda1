"""The exact split's peak against that of the plain step it is added to."""

import pytest
import torch
from common import build_model, noise_views
from loop import Loop
from memory import Memory, peak_memory
from peak_memory import meta_candidates, started
from peers import PEERS, UNIT


def peaks(backbone: str, batch: int, size: int) -> dict[str, Memory]:
    views = noise_views(batch, size)
    plain = started(backbone, size, views, "float32", PEERS[UNIT])
    found = {"plain": peak_memory(plain.step, plain.resident())}
    del plain
    loop = started(backbone, size, views, "float32", {})
    found["iteration"] = peak_memory(loop.step, loop.resident())
    loop.optimizer.zero_grad()
    candidates = meta_candidates(loop)
    for name in ("exact", "unrolled"):
        found[name] = peak_memory(candidates[name], loop.resident())
    return found


@pytest.mark.parametrize(
    ("backbone", "size"),
    [("conv4", 32), *(pytest.param("resnet18", size, marks=pytest.mark.slow) for size in (16, 32))],
)
def test_exact_stays_below_twice_the_plain_step(backbone, size):
    found = peaks(backbone, 8, size)
    unit = found["plain"].peak
    assert found["exact"].peak < 2 * unit
    assert found["iteration"].peak < 2 * unit
    # without the weights, which every step holds: activations and gradients alone
    exact, unrolled, plain = (
        found[name].peak - found[name].resident for name in ("exact", "unrolled", "plain")
    )
    assert exact < 2 * plain
    if backbone == "resnet18":  # two graphs at once
        assert exact < unrolled


@pytest.mark.skipif(torch.cuda.is_available(), reason="the allocator's peak depends on what it has cached")
def test_the_count_is_the_same_every_time():
    loop = Loop(build_model("conv4", 16), noise_views(4, 16))
    loop.step()
    first, second = (peak_memory(loop.step, loop.resident()) for _ in range(2))
    assert first == second and first.peak > first.resident
