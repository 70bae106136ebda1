"""A function replayed as one CUDA graph."""

import pytest
import torch
from torch import nn

from metamask_plugin.bilevel import CudaGraph, MetaGradient


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


def test_inputs_go_to_the_captured_place_and_outputs_come_as_copies(graph_stand_in):
    places = []

    def function(lengths, views, nothing):
        places.append([x.data_ptr() for x in (*lengths, *views)])
        assert nothing is None
        return MetaGradient((lengths[0] * views[0],), views[1].sum(), views[1].mean())

    graph, results = CudaGraph(function, warmup=2), []
    for number in range(5):
        views = [torch.full((3,), float(number)), torch.full((2,), 2.0 * number)]
        results.append(graph([torch.tensor(10.0)], views, None))
    for number, result in enumerate(results):
        assert isinstance(result, MetaGradient)
        torch.testing.assert_close(result.weights[0], torch.full((3,), 10.0 * number))
        assert (result.inner_loss, result.outer_loss) == (4 * number, 2 * number)
    assert places[2] == places[3] == places[4] == places[5] != places[1]  # the capture, three replays


def test_another_shape_and_random_numbers_run_as_they_are(graph_stand_in):
    graph = CudaGraph(lambda x: x + 1, warmup=1)
    for x in (torch.zeros(3), torch.zeros(3), torch.zeros(2)):
        torch.testing.assert_close(graph(x), torch.ones(len(x)))
    assert graph.graph is not None
    graph = CudaGraph(lambda x: torch.rand_like(x), warmup=1)
    for _ in range(3):
        graph(torch.zeros(3))
    assert graph.draws and graph.graph is None


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
