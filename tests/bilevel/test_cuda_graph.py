"""A function replayed as one CUDA graph."""

import pytest
import torch
from torch import nn

from metamask_plugin.bilevel import CaptureError, CudaGraph, MetaGradient
from metamask_plugin.bilevel.cuda_graph import _dropout


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
    calls, parameter = [], torch.ones(())

    def function(lengths, views, nothing):
        calls.append(nothing)
        return MetaGradient(
            (lengths[0] * views[0] * parameter,),
            views[1].sum(),
            views[1].mean(),
            views[1].sum(),
            views[1].mean(),
        )

    graph, results = CudaGraph(function, warmup=2), []
    for number in range(6):
        views = [torch.full((3,), float(number)), torch.full((2,), 2.0 * number)]
        results.append(graph([torch.tensor(10.0)], views, None))
        parameter.add_(1)
    for number, result in enumerate(results):
        assert isinstance(result, MetaGradient)
        torch.testing.assert_close(result.outer_params[0], torch.full((3,), 10.0 * number * (number + 1)))
        assert (result.inner_loss, result.outer_loss) == (4 * number, 2 * number)
    assert calls == [None] * 3  # two before, and the capture


def test_the_stand_in_reads_stale_what_was_rebound(graph_stand_in):
    owner = {"queue": torch.ones(())}
    graph = CudaGraph(lambda x: x * owner["queue"], warmup=1)
    for number in range(3):
        owner["queue"] = torch.full((), number + 1.0)
        found = graph(torch.ones(()))
    assert found == 2  # as it was when captured


def test_another_shape_runs_as_it_is(graph_stand_in):
    graph = CudaGraph(lambda x: x + 1, warmup=2)
    for count in (3, 2, 3, 3, 3, 2):
        torch.testing.assert_close(graph(torch.zeros(count)), torch.ones(count))
        assert (graph.graph is None) == (len(_shapes(graph)) == 0)
    assert _shapes(graph) == [(3,)]  # the first shape that came three times in turn


def _shapes(graph):
    return [tuple(x.shape) for x in graph._args]


@pytest.mark.parametrize(
    "function",
    [torch.rand_like, lambda x: nn.functional.dropout(x, 0.5), lambda x: x + torch.randperm(len(x))],
)
def test_what_draws_random_numbers_runs_as_it_is(graph_stand_in, function):
    graph = CudaGraph(function, warmup=1)
    with pytest.warns(UserWarning, match="CudaGraph: what draws random numbers is not captured"):
        graph(torch.zeros(3))
    graph(torch.zeros(3))
    assert graph.draws and graph.graph is None


@pytest.mark.parametrize(("rate", "draws"), [(0.0, False), (0.5, True)])
def test_attention_draws_with_dropout_alone(rate, draws):
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert torch.Tag.nondeterministic_seeded in flash.tags
    q = torch.zeros(1, 1, 2, 4)
    assert (_dropout(flash, (q, q, q, rate), {}) != 0) == draws
    assert (_dropout(flash, (q, q, q), {"dropout_p": rate}) != 0) == draws
    assert _dropout(torch.ops.aten.bernoulli.default, (q,), {}) is None


def test_what_cannot_be_captured_says_so(graph_stand_in):
    calls = []

    def function(x):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x

    graph = CudaGraph(function, warmup=1)
    graph(torch.zeros(2))
    with pytest.raises(CaptureError, match="cannot be captured: operation not permitted"):
        graph(torch.zeros(2))


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
    with pytest.warns(UserWarning, match="draws random numbers"):
        graph(x)
    assert not torch.equal(*(graph(x)[0] for _ in range(2)))
    assert graph.draws and graph.graph is None
