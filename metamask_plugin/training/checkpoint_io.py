"""How checkpoints come to the disk, and back from it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from metamask_plugin.evaluation.checksums import check_records
from metamask_plugin.evaluation.files import remove_unfinished, replacing
from metamask_plugin.retry import retried


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without running code.

    Whatever ends the process, or the machine, the name stands for the old file or for the new one. What
    ``last.ckpt`` was before becomes ``previous.ckpt``.
    """

    KEPT = {"last.ckpt": "previous.ckpt"}
    """Files whose predecessor is kept, and under which name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        remove_unfinished(path.parent)  # what a killed process has left may fill the disk
        kept = path.with_name(self.KEPT[path.name]) if path.name in self.KEPT else None

        def write() -> None:
            with replacing(path, kept) as file:
                _save(checkpoint, file)

        retried(write)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable | None = lambda storage, _: storage, **_: Any
    ) -> dict[str, Any]:
        check_records(Path(path))
        return torch.load(path, map_location=map_location, weights_only=True)


class _Watched:
    """A file that remembers why it could not be written: ``torch.save`` raises something else then."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.error = file, None

    def write(self, data: bytes) -> int:
        try:
            return self.file.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def _save(content: dict[str, Any], file: BinaryIO) -> None:
    watched = _Watched(file)
    try:
        torch.save(content, watched)
    except Exception:
        if watched.error is not None:
            raise watched.error from None
        raise
