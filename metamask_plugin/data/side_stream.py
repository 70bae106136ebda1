"""Prepares the next batch on a CUDA stream of its own."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection


class SideStream:
    """Runs what prepares a batch beside the training step that the device is still busy with.

    kornia copies what it has drawn to the device, and waits for each copy. On the training step's stream
    that would be a wait for the whole step; here it is one for the copy alone. Without CUDA all of this does
    nothing.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def on(self, device: torch.device) -> Iterator[None]:
        """Within it, kernels and copies for ``device`` go to the side stream."""
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device, priority=-1)
        with torch.cuda.stream(self._stream) if device.type == "cuda" else nullcontext():
            yield

    def join(self, batch: Any) -> Any:
        """Lets the current stream wait, on the device, for the batch; returns it."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._stream.device)
            current.wait_stream(self._stream)
            apply_to_collection(batch, torch.Tensor, lambda x: x.is_cuda and x.record_stream(current))
        return batch
