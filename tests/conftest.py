"""For all tests: one thread, float64 or a stand-in for CUDA graphs where a test asks, the count of faults."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._pytree import tree_leaves

from metamask_plugin.bilevel import CudaGraph

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and on a busy machine for long


@pytest.fixture
def double():
    """Float64 as the default dtype for one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def graph_stand_in(monkeypatch):
    """On the CPU, in place of a CUDA graph: a replay calls the function on the captured inputs."""

    class StandIn:
        def replay(self):
            outputs = tree_leaves(self.of.function(*self.of._args))
            for captured, output in zip(tree_leaves(self.of._output), outputs):
                captured.copy_(output)

    capture = CudaGraph._capture

    def _capture(self, args):
        capture(self, args)
        self.graph.of = self

    @contextmanager
    def graph(graph, capture_error_mode):
        yield

    monkeypatch.setattr(CudaGraph, "on_gpu", staticmethod(lambda x: True))
    monkeypatch.setattr(CudaGraph, "_capture", _capture)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", graph)


@pytest.fixture(autouse=True)
def _counted(request, record_property):
    """Writes a test's marks into the JUnit file, from which the table of docs/reliability.md is made."""
    for name in ("fault", "load"):
        marker = request.node.get_closest_marker(name)
        if marker is not None:
            record_property(name, marker.args[0])
