"""The folder of a run: its files, how far the run has come, and the lock that gives it to one process."""

import contextlib
import errno
import json
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.files import read_json, write_whole
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.retry import retried

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = ".lock"
POLL_SECONDS = 0.5
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


@dataclass(frozen=True)
class CheckpointHeader:
    """What a checkpoint says of its run, without the tensors.

    Attributes:
        experiment: see :func:`~metamask_plugin.training.experiment.experiment_of`.
        steps: optimiser steps.
        epochs: whole epochs.
        best: ``metric``, ``epoch`` and ``value`` of the best epoch so far; None if none was measured.
    """

    experiment: dict[str, Any]
    steps: int
    epochs: int
    best: dict[str, Any] | None


def header_of(checkpoint: Path) -> CheckpointHeader | None:
    """Reads a checkpoint's header; None if the file is missing, damaged, or does not name its run."""
    try:
        state = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        return CheckpointHeader(
            experiment=dict(state["identity"]),
            steps=state["global_step"],
            epochs=state["epoch"] + (0 if state["batches_done"] else 1),
            best=state["callbacks"].get("BestCheckpoint"),
        )
    except Exception:  # damage shows in many ways; resuming from the file reports it
        return None


@dataclass
class RunFolder:
    """The files of one run.

    Attributes:
        path: the folder.
    """

    path: Path

    @property
    def last_checkpoint(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def previous_checkpoint(self) -> Path:
        """The last checkpoint before the current one."""
        return self.path / "previous.ckpt"

    @property
    def best_checkpoint(self) -> Path:
        return self.path / "best" / "best.ckpt"

    @property
    def summary(self) -> Path:
        return self.path / "summary.json"

    @property
    def table(self) -> Path:
        return self.path / "table.txt"

    @property
    def finished(self) -> Path:
        """Written after the last epoch and its checkpoint."""
        return self.path / "finished.json"

    @property
    def is_finished(self) -> bool:
        """Whether the run was trained to its end."""
        return bool(_read(self.finished))

    @property
    def has_begun(self) -> bool:
        """Whether there is a checkpoint to continue from, or nothing left to do."""
        return self.is_finished or self.last_checkpoint.exists()

    def is_complete(self, with_checkpoint: bool, evaluation: Mapping[str, Any] | None) -> bool:
        """Whether there is nothing left to do.

        Args:
            with_checkpoint: whether the run is to leave a checkpoint.
            evaluation: settings of the wanted final report; None for no report.
        """
        finished, last = _read(self.finished), header_of(self.last_checkpoint) if with_checkpoint else None
        if not finished or (with_checkpoint and (last is None or last.steps != finished.get("steps"))):
            return False
        return evaluation is None or (
            self.table.exists() and _read(self.summary).get("evaluated_with") == evaluation
        )

    def start(self, cfg: DictConfig, skipped: Sequence[object], anew: bool) -> None:
        """Makes the folder and writes ``args.json``, the resolved config, for the evaluators.

        Args:
            cfg: the complete config.
            skipped: images that were left out, for ``skipped_images.txt``, one a line.
            anew: whether the run begins at its first step.
        """
        if anew:
            self.finished.unlink(missing_ok=True)
        for folder in (self.path, self.best_checkpoint.parent):
            write_whole(folder / "args.json", json.dumps(OmegaConf.to_container(cfg, resolve=True), indent=2))
        if skipped:
            write_whole(self.path / "skipped_images.txt", "".join(f"{image}\n" for image in skipped))

    def finish(self, epochs: int, steps: int, seconds: float) -> None:
        """Records that the run was trained to its end.

        Args:
            epochs: of all processes of the run.
            steps: of the optimiser, of all processes of the run.
            seconds: of the last process.
        """
        write_summary(self.finished, {"epochs": epochs, "steps": steps, "seconds": round(seconds, 1)})


def _read(path: Path) -> dict[str, Any]:
    def fault_of(content: Any) -> str | None:
        return None if isinstance(content, dict) else "it holds no mapping"

    return read_json(path, fault_of, "the run goes on without it") or {}


_held: set[int] = set()


class FolderLocked(UserError):
    """Another process writes into the folder."""


@contextlib.contextmanager
def locked(folder: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Holds the lock of a folder, which is made if it is missing.

    The kernel releases the lock when the process ends. Only rank 0 locks; the other ranks of a run share its
    folder. The lock is not re-entrant.

    Args:
        folder: the folder; its file ``.lock`` names the process that holds the lock, and stays afterwards.
        what: the folder's name in messages, e.g. ``"the run folder"``.
        wait: whether to wait for another process that holds the lock, after a note.

    Raises:
        FolderLocked: another process holds the lock, and ``wait`` is False.
    """
    if fcntl is None or _rank() > 0:
        yield
        return
    made = _make(folder)
    handle = _opened(folder)
    _held.add(handle)
    try:
        while _acquired(handle, folder, what, wait):
            if _is_current(handle, folder):
                _sign(handle)
                break
            made = _make(folder)  # the last holder has removed the folder, as below
            current = _opened(folder)
            os.dup2(current, handle, inheritable=False)
            os.close(current)
        yield
    finally:
        if handle in _held:  # a forked child has closed it
            _remove_if_empty(folder, made)
            _held.discard(handle)
            with contextlib.suppress(OSError):  # before closing: a child that is being forked has a copy
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _make(folder: Path) -> list[Path]:
    """Makes a folder; returns it and its parents that were missing, the innermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, NotADirectoryError) as error:  # below /proc, say, or a file
        raise UserError(
            f"a folder must be one that can be made, got {str(folder)!r} ({error.strerror}); set another "
            "checkpoint.dir"
        ) from error
    return missing


def _remove_if_empty(folder: Path, made: list[Path]) -> None:
    """Removes the folders that were made for the lock if they hold nothing else."""
    with contextlib.suppress(OSError):
        if made and os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            for path in made:
                path.rmdir()


def _opened(folder: Path) -> int:
    return retried(lambda: os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666))


def _is_current(handle: int, folder: Path) -> bool:
    """Whether the lock file is still the one in the folder."""
    try:
        return os.fstat(handle).st_ino == os.stat(folder / LOCK).st_ino
    except FileNotFoundError:
        return False


def is_locked(folder: Path) -> bool:
    """Whether a process holds the folder's lock."""
    if fcntl is None:
        return False
    try:
        handle = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return False
    except OSError as error:
        return error.errno == errno.EWOULDBLOCK
    finally:
        os.close(handle)


def _acquired(handle: int, folder: Path, what: str, wait: bool) -> bool:
    """Acquires the lock; False if the file system has no locks."""
    tries = 0
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(
                    f"warning: {folder} cannot be locked ({os.strerror(error.errno)}): start no second "
                    "process that writes there",
                    file=sys.stderr,
                )
                return False
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
        tries += 1
        if tries == 1:
            time.sleep(0.05)  # another process may only be calling is_locked
            continue
        owner = _owner(folder / LOCK)
        if not wait:
            raise FolderLocked(
                f"{what} {folder} must be used by one process at a time, is being written by {owner}; "
                "wait for it, or end it"
            )
        if tries == 2:
            print(f"note: waiting for {owner}, which writes {what} {folder}", flush=True)
        time.sleep(POLL_SECONDS)  # a blocking call would delay signal handlers


def _sign(handle: int) -> None:
    """Names this process in the lock file; only messages read it, so a failure does not matter."""
    with contextlib.suppress(OSError):
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def _owner(file: Path) -> str:
    try:
        pid, host = file.read_text().split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"


def _rank() -> int:
    """This process's rank; before Lightning has launched several nodes, the node's."""
    node = os.environ.get("NODE_RANK", "0")
    return rank_zero_only.rank or (int(node) if node.isdigit() else 0)


def _leave_to_parent() -> None:
    """Closes the lock in a forked child, e.g. a loader's worker, which would keep it beyond its parent."""
    for handle in _held:
        os.close(handle)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
