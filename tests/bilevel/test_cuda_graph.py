"""A function replayed as one CUDA graph."""

import pytest
import torch
from torch import nn

from metamask_plugin.bilevel import CudaGraph


def test_elsewhere_it_is_the_function():
    calls = []

    def double(x):
        calls.append(x)
        return (2 * x,)

    graph = CudaGraph(double, warmup=1)
    for number in range(4):
        assert graph(torch.tensor(number))[0] == 2 * number
    assert len(calls) == 4 and graph.graph is None


def test_without_a_call_before_the_capture_it_is_refused():
    with pytest.raises(ValueError, match=r"^CudaGraph: warmup must be >= 1, got 0"):
        CudaGraph(lambda x: (x,), warmup=0)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_cuda
def test_a_replay_reads_inputs_and_parameters_as_they_are_now():
    layer, calls = nn.Linear(4, 4).cuda(), []

    def gradient(x, scale):
        calls.append(1)
        loss = (layer(x) * scale).square().sum()
        return torch.autograd.grad(loss, list(layer.parameters()))

    graph = CudaGraph(gradient, warmup=2)
    for number in range(5):
        x, scale = torch.randn(3, 4, device="cuda"), torch.full((), number + 1.0, device="cuda")
        found, expected = graph(x, scale), gradient(x, scale)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other)
        with torch.no_grad():
            layer.weight.add_(0.1)
    assert graph.graph is not None
    assert len(calls) == 5 + 2 + 1  # the comparisons, the calls before, and the capture
    kept = graph(x, scale)[0].clone()
    graph(2 * x, scale)
    torch.testing.assert_close(graph(x, scale)[0], kept)
    assert graph(x[:2], scale)[0].shape == (4, 4)  # of another shape: as it is


@pytest.mark.gpu
@needs_cuda
def test_what_draws_random_numbers_is_not_captured():
    graph = CudaGraph(lambda x: (nn.functional.dropout(x, 0.5),), warmup=1)
    x = torch.ones(1000, device="cuda")
    assert not torch.equal(*(graph(x)[0] for _ in range(2)))
    assert graph.draws and graph.graph is None
