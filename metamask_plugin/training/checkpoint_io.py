"""How checkpoints come to the disk, and back from it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO

from metamask_plugin.evaluation.checksums import check_records


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all, and reads it without running code.

    Written are the bytes beside the file's place, then flushed to the disk, then moved there: whatever ends
    the process, or the machine, the name stands for the old file or for the new one. What ``last.ckpt`` was
    before becomes ``previous.ckpt``.
    """

    KEPT = {"last.ckpt": "previous.ckpt"}
    """Files whose predecessor is kept, and under which name."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None
    ) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".part")
        try:
            with open(partial, "wb") as file:
                _save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
        except BaseException as error:
            partial.unlink(missing_ok=True)  # a full disk is not to be filled by a file of no use
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, str(path)) from error
            raise
        if path.name in self.KEPT and path.exists():
            os.replace(path, path.with_name(self.KEPT[path.name]))
        os.replace(partial, path)
        _flush_folder(path.parent)

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


def _flush_folder(path: Path) -> None:
    """The names, too, are to survive a loss of power, where folders can be flushed."""
    try:
        folder = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError:
        pass
    finally:
        os.close(folder)
