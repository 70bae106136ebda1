"""For all tests: one thread, float64 or a stand-in for CUDA graphs where a test asks, the count of faults."""

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metamask_plugin.bilevel import CudaGraph

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and on a busy machine for long


@pytest.fixture
def double():
    """Float64 as the default dtype for one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


class GraphStandIn:
    """What a CUDA graph does, on the CPU: repeats operators on the very tensors that they had when captured.

    So it reads stale whatever a real graph would read stale.
    """

    def __init__(self):
        self.operators = []

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outputs, fresh in self.operators:
                if "empty" in func.name() or not (any(fresh) or func._schema.is_mutable):
                    continue  # memory that somebody else fills, and views
                for old, new, made in zip(outputs, tree_leaves(func(*args, **kwargs)), fresh):
                    if made:
                        old.detach().copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        leaves = tree_leaves(outputs)
        fresh = [isinstance(x, torch.Tensor) and _memory(x) not in given for x in leaves]
        self.graph.operators.append((func, args, kwargs, leaves, fresh))
        return outputs


def _memory(x):
    return x.untyped_storage()._cdata


@pytest.fixture
def graph_stand_in(monkeypatch):
    """In place of CUDA graphs."""

    @contextmanager
    def graph(graph, capture_error_mode):
        with Recorder(graph):
            yield

    monkeypatch.setattr(CudaGraph, "on_gpu", staticmethod(lambda x: True))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", GraphStandIn)
    monkeypatch.setattr(torch.cuda, "graph", graph)


@pytest.fixture(autouse=True)
def _counted(request, record_property):
    """Writes a test's marks into the JUnit file, from which the table of docs/reliability.md is made."""
    for name in ("fault", "load"):
        marker = request.node.get_closest_marker(name)
        if marker is not None:
            record_property(name, marker.args[0])
            if "source" in marker.kwargs:
                record_property("source", marker.kwargs["source"])
