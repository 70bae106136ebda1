"""Switches of the whole process that a training sets, put back when it ends."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable that Lightning sets for ``deterministic``, which cuBLAS asks for."""


@contextmanager
def torch_flags_kept() -> Iterator[None]:
    """Leaves ``deterministic`` and ``benchmark`` behind as it found them.

    Lightning's Trainer switches torch's deterministic algorithms on and never off: the next run of a sweep
    would have them, too, and be slower or fail without having asked.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    workspace = os.environ.get(WORKSPACE)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
        if workspace is None:
            os.environ.pop(WORKSPACE, None)
        else:
            os.environ[WORKSPACE] = workspace
