"""The processes of one run: how they start, what each draws and saves, and how all of them end together."""

import inspect
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import Strategy, StrategyRegistry

from metamask_plugin.errors import UserError, check
from metamask_plugin.signals import SIGNALS, Preempted
from metamask_plugin.training.run_folder import RunFolder


def with_timeout(strategy: str, seconds: Any) -> Strategy | str:
    """Lightning's strategy of that name, whose collectives give up after ``seconds``.

    A rank that hangs (a stopped process, a dead disk) keeps the others waiting in a collective, which raises
    after this time. Starting a process counts, too: all wait for the last one's imports.

    Args:
        strategy: its name; ``auto`` means ``ddp``, as it does for several processes.
        seconds: the timeout; None for Lightning's, half an hour.

    Raises:
        UserError: not a positive number, or a strategy without process groups.
    """
    if seconds is None:
        return strategy
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and seconds > 0
    check(number, "process_timeout", "a number of seconds > 0, or null for Lightning's default", seconds)
    name = "ddp" if strategy == "auto" else strategy
    entry = dict(StrategyRegistry).get(name)  # its own get makes the strategy
    known = entry is not None and "timeout" in inspect.signature(entry["strategy"].__init__).parameters
    check(known, "process_timeout", f"null with strategy={strategy!r}, which has no such setting", seconds)
    return entry["strategy"](timeout=timedelta(seconds=seconds), **entry["init_params"])


class SameFolder(pl.Callback):
    """Gives all ranks the folder of rank 0: a rank that starts later may have chosen the next free one.

    Args:
        folder: of the run; only rank 0 has written into it so far.
    """

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.folder.path = Path(trainer.strategy.broadcast(str(self.folder.path)))


class RankDraws(pl.Callback):
    """Seeds the global generators of each of several processes by seed, epoch and rank.

    All processes build the model from one seed, so that their weights agree; they would also draw the same
    augmentations for different images. After the start no draw from the global generators has to agree:
    W-MSE's slices are broadcast, and the order of the images and the seeds of DALI and of the workers come
    from generators of their own. A single process keeps its one sequence.

    Must stand behind the callback that restores a resumed run's generators: an epoch that is resumed within
    continues with those of the checkpoint, which has them for each rank.

    Args:
        seed: of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.world_size > 1:
            key = np.random.SeedSequence([self.seed, trainer.current_epoch, trainer.global_rank])
            of_torch, of_numpy, of_python = key.generate_state(3)
            torch.manual_seed(int(of_torch))  # CUDA's, too
            np.random.seed(of_numpy)
            random.seed(int(of_python))


def of_all_ranks(mine: Any) -> list[Any]:
    """Gathers every rank's value, in order; every rank must call it. Plain values and CPU tensors."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    values = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, mine)
    return values


def of_this_rank(trainer: pl.Trainer, values: list[Any] | None) -> Any | None:
    """This rank's value of what :func:`of_all_ranks` gave; None if another number of processes saved it."""
    if not isinstance(values, list) or len(values) != trainer.world_size:
        return None
    return values[trainer.global_rank]


POLL_SECONDS = 0.2
"""Interval of checks on the other processes."""

GRACE_SECONDS = 5.0
"""How long the training loop may take to end by itself: gloo's collectives raise, NCCL's hang."""

PATIENCE_SECONDS = 10.0
"""How long a launched rank that has lost the others waits for rank 0 to end it before it reports."""

YIELD_SECONDS = 1.0
"""How long a launched rank delays its own message: rank 0 may be about to print the same."""

NETWORK_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "pair closure", "tcpstore")
"""Words of collectives' errors from C++, in lower case; those are plain RuntimeErrors."""


class RankFailure(UserError):
    """Another process of the run has failed. The message names it and how to resume."""


@contextmanager
def watched_ranks(trainer: pl.Trainer, remedy: Callable[[], str]) -> Iterator[None]:
    """Ends all processes of a run when one fails, with one line about that one.

    Without this, Lightning silently kills all processes, rank 0 included, some seconds after a launched one
    has died, and the collectives of the survivors raise errors that name an address and no process. Here rank
    0 watches the processes that it has launched, and these watch rank 0. The process that failed first was

    - killed, or raised an exception: the survivor that notices raises a :class:`RankFailure`;
    - ended by one of the signals in :mod:`metamask_plugin.signals`: a :class:`Preempted`;
    - ended by a ``UserError``, which it has printed: the others end silently, also with exit code 2;
    - silent for longer than the process group's timeout: a :class:`RankFailure` names the stopped process.

    Under torchrun or SLURM, the launcher terminates the other processes.

    Args:
        trainer: about to train.
        remedy: returns how to resume, ``resume with resume_from_checkpoint=...``; called after a failure.

    Raises:
        RankFailure: another process has failed.
        SystemExit: another process has failed and reported it.
        Preempted: a signal has ended another process.
    """
    if trainer.world_size == 1:
        yield
        return
    ranks = _role(trainer)(trainer, remedy)
    ranks.start()
    try:
        yield
    except UserError:
        ranks.before_own_message()
        raise
    except (SystemExit, Preempted):
        ranks.end_together()
        raise
    except Exception as error:
        ranks.explain(error)
        raise
    finally:
        ranks.done.set()


def _role(trainer: pl.Trainer) -> type["_Rank"]:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    launcher = trainer.strategy.launcher
    if isinstance(environment, LightningEnvironment) and isinstance(getattr(launcher, "procs", None), list):
        return _LaunchingRank if environment.local_rank() == 0 else _LaunchedRank
    return _Rank


class _Rank(threading.Thread):
    """One of several processes that torchrun, SLURM or the like has launched.

    Attributes:
        done: set when the training is over, also after a failure.
    """

    def __init__(self, trainer: pl.Trainer, remedy: Callable[[], str]):
        super().__init__(name="rank-watch", daemon=True)
        self.trainer, self.remedy = trainer, remedy
        self.done = threading.Event()

    def run(self) -> None:
        """Watches the other processes; nothing here."""

    def before_own_message(self) -> None:
        """This process is about to report its own error and end."""

    def end_together(self) -> None:
        """This process is about to end by a signal; usually all of them are."""

    def explain(self, error: Exception) -> None:
        """Raises the cause of ``error`` if that is the failure of another process."""
        if lost_contact(error):
            raise RankFailure(
                f"rank {self.trainer.global_rank} has lost the other ranks ({reason(error)}); "
                f"the one that failed first has said why; {self.remedy()}"
            ) from None

    def leave(self, line: str, code: int = 2) -> None:
        """Ends this process from its watching thread: its training loop hangs in a collective."""
        print(line, file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        os._exit(code)


class _LaunchingRank(_Rank):
    """Rank 0, which has launched the other processes of its machine."""

    def __init__(self, trainer: pl.Trainer, remedy: Callable[[], str]):
        super().__init__(trainer, remedy)
        self.launcher = trainer.strategy.launcher
        self.others: list[subprocess.Popen] = []
        self.failed = threading.Event()

    def run(self) -> None:
        while not self._take_over():
            if self.done.wait(POLL_SECONDS):
                return
        alive = True
        while alive:  # also after the training's end: a process that ends must not stay a zombie
            alive = [rank.poll() for rank in self.others].count(None) > 0
            if self._first_failed() is not None and not self.done.is_set():
                self.failed.set()
                if not self.done.wait(GRACE_SECONDS):
                    self._leave_stuck()
            time.sleep(POLL_SECONDS)

    def _take_over(self) -> bool:
        """Takes the launched processes from Lightning's observer, which would silently kill rank 0, too.

        The launcher keeps a list of them, to forward signals to them; the observer keeps an empty one.
        """
        procs = self.launcher.procs
        if len(procs) < self.launcher.num_processes - 1:
            return False
        self.others = list(procs)
        self.launcher.procs = self.others
        procs.clear()
        return True

    def _first_failed(self) -> int | None:
        """Index of the failed process, one below its local rank; preferably of one that printed no line."""
        failed = [number for number, rank in enumerate(self.others) if rank.returncode]
        return min(failed, key=lambda number: self.others[number].returncode == 2, default=None)

    def before_own_message(self) -> None:
        self._end_others()

    def end_together(self) -> None:
        until = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < until and any(rank.poll() is None for rank in self.others):
            time.sleep(POLL_SECONDS)
        self._end_others()

    def explain(self, error: Exception) -> None:
        foreign = lost_contact(error)
        if foreign:  # the connection breaks a moment before the process is gone
            silence = re.search("timed out|timeout", str(error).lower())
            self.failed.wait(POLL_SECONDS if silence else PATIENCE_SECONDS)
        stopped = [self._called(number) for number, rank in enumerate(self.others) if is_stopped(rank.pid)]
        self._end_others()
        if self.failed.is_set():
            raise self._failure() from None
        if foreign:
            silent = f"{', '.join(stopped)} is stopped" if stopped else f"no answer: {reason(error)}"
            raise RankFailure(f"the ranks have lost each other: {silent}; {self.remedy()}") from None

    def _failure(self) -> BaseException:
        number = self._first_failed()
        code = self.others[number].returncode
        if code == 2:
            return SystemExit(2)
        asked = -code if code < 0 else code - 128
        if asked in SIGNALS:
            return Preempted(asked)
        if code >= 0:
            ending = f"ended with exit code {code}, its message is above"
        else:
            name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
            hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
            ending = f"was killed by {name} (exit code {code}){hint}"
        return RankFailure(f"{self._called(number)} {ending}; {self.remedy()}")

    def _leave_stuck(self) -> None:
        failure = self._failure()
        self._end_others()
        if isinstance(failure, SystemExit):
            os._exit(2)
        if isinstance(failure, Preempted):
            self.leave(f"{failure}: interrupted; {self.remedy()}", failure.exit_code)
        self.leave(f"error: {failure}")

    def _end_others(self) -> None:
        for rank in self.others:
            if rank.poll() is None:
                rank.kill()  # a process that hangs in a collective does not handle SIGTERM
        for rank in self.others:
            rank.wait()

    def _called(self, number: int) -> str:
        rank = self.trainer.global_rank + number + 1
        return f"rank {rank} (pid {self.others[number].pid})"


class _LaunchedRank(_Rank):
    """A process launched by rank 0 of its machine."""

    def __init__(self, trainer: pl.Trainer, remedy: Callable[[], str]):
        super().__init__(trainer, remedy)
        self.parent = os.getppid()

    def run(self) -> None:
        while not self.done.wait(POLL_SECONDS):
            if self._orphaned():
                if not self.done.wait(GRACE_SECONDS):
                    self.leave(f"error: {self._line()}")
                return

    def before_own_message(self) -> None:
        time.sleep(YIELD_SECONDS)

    def explain(self, error: Exception) -> None:
        if not lost_contact(error):
            return
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until and not self._orphaned():
            time.sleep(POLL_SECONDS)
        if self.trainer.local_rank != 1:  # one line is enough
            raise SystemExit(2) from None
        if self._orphaned():
            raise RankFailure(self._line()) from None
        state = "is stopped" if is_stopped(self.parent) else f"did not answer: {reason(error)}"
        raise RankFailure(
            f"the ranks have lost each other: rank 0 (pid {self.parent}) {state}; {self.remedy()}"
        ) from None

    def _orphaned(self) -> bool:
        return os.getppid() != self.parent

    def _line(self) -> str:
        return f"rank 0 (pid {self.parent}) is gone, killed perhaps for want of memory; {self.remedy()}"


def lost_contact(error: Exception) -> bool:
    """Whether the error is a collective's that cannot reach the other processes.

    It is known by the file that raised it, as gloo has many phrases; an error that DistributedDataParallel
    raises within backward is known by its words only.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    collective = frames and Path(frames[-1].filename).match("torch/distributed/*.py")
    return bool(collective) or any(word in str(error).lower() for word in NETWORK_WORDS)


def reason(error: Exception) -> str:
    """The first sentence of a collective's error, without its source position."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error)).splitlines()[0].partition(". ")[0]


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP, a debugger); False on systems without /proc."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"
