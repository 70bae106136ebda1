"""For all tests: one thread, and float64 where a test asks for it."""

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny: a second thread only waits, and on a busy machine for long


@pytest.fixture
def double():
    """Float64 as the default dtype for one test."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)
