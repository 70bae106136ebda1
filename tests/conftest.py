"""For all tests: one thread, float64 where a test asks for it, and the count of injected faults."""

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and on a busy machine for long


@pytest.fixture
def double():
    """Float64 as the default dtype for one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture(autouse=True)
def _counted(request, record_property):
    """Writes a test's marks into the JUnit file, from which the table of docs/reliability.md is made."""
    for name in ("fault", "load"):
        marker = request.node.get_closest_marker(name)
        if marker is not None:
            record_property(name, marker.args[0])
