"""When one of several processes fails, all of them end, and the one that failed says why."""

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment

from metamask_plugin.errors import UserError
from metamask_plugin.signals import SIGNALS, Preempted

POLL_SECONDS = 0.2
"""Between two looks at the other processes."""

GRACE_SECONDS = 5.0
"""Within which the training loop may come out by itself: gloo's collectives do, NCCL's hang."""

PATIENCE_SECONDS = 10.0
"""That a launched rank, having lost the others, waits for rank 0 to end it before it reports by itself."""

YIELD_SECONDS = 1.0
"""That a launched rank keeps its own message back, as rank 0 may be about to say the same."""

NETWORK_WORDS = ("gloo", "nccl", "connection closed", "connection reset", "pair closure", "tcpstore")
"""By one of them, in lower case, errors of collectives are known that come from C++; plain RuntimeErrors."""


class RankFailure(UserError):
    """Another process of the run has failed; the message names it, and how the run goes on."""


@contextmanager
def watched_ranks(trainer: pl.Trainer, remedy: Callable[[], str]) -> Iterator[None]:
    """Within it the processes of a run live and die together; nothing happens where there is one alone.

    Lightning kills all processes, itself included, some seconds after a launched one has died, without a
    word; before that the collectives of the survivors raise what names an address and no process. Here rank 0
    watches the processes that it has launched, these watch rank 0, and what comes out is one line for the
    process that failed first:

    - killed, or dead of an exception: a :class:`RankFailure` of the survivor that notices;
    - ended by a signal that asks for it, see :mod:`metamask_plugin.signals`: a :class:`Preempted`;
    - dead of a ``UserError``, which it has printed: the others end in silence, with the same exit code 2;
    - silent for longer than the process group's timeout: a :class:`RankFailure` that names who is stopped.

    Where somebody else has launched the processes (torchrun, SLURM), ending the others is left to him.

    Args:
        trainer: about to train.
        remedy: says how the run goes on, ``resume with resume_from_checkpoint=...``; asked after a failure.

    Raises:
        RankFailure: another process has failed.
        SystemExit: another process has failed and said so.
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
    """A process among others, as it is where somebody else has launched them all.

    Attributes:
        done: the training is over, one way or the other.
    """

    def __init__(self, trainer: pl.Trainer, remedy: Callable[[], str]):
        super().__init__(name="rank-watch", daemon=True)
        self.trainer, self.remedy = trainer, remedy
        self.done = threading.Event()

    def run(self) -> None:
        """Watches; nothing here."""

    def before_own_message(self) -> None:
        """This process is about to print what is wrong and end."""

    def end_together(self) -> None:
        """This process is about to end, as a signal has asked for it; usually they all are."""

    def explain(self, error: Exception) -> None:
        """Raises what is behind ``error``, if that is the failure of another process."""
        if lost_contact(error):
            raise RankFailure(
                f"rank {self.trainer.global_rank} has lost the other ranks ({reason(error)}); "
                f"the one that failed first has said why; {self.remedy()}"
            ) from None

    def leave(self, line: str, code: int = 2) -> None:
        """Ends this process where its training loop hangs in a collective and cannot be reached."""
        print(line, file=sys.stderr, flush=True)
        for worker in multiprocessing.active_children():
            worker.kill()
        sys.stdout.flush()
        os._exit(code)


class _LaunchingRank(_Rank):
    """Rank 0, which has launched the others of its machine."""

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
        while alive:  # behind the training's end, too: who has ended is to be no zombie
            alive = [rank.poll() for rank in self.others].count(None) > 0
            if self._first_failed() is not None and not self.done.is_set():
                self.failed.set()
                if not self.done.wait(GRACE_SECONDS):
                    self._leave_stuck()
            time.sleep(POLL_SECONDS)

    def _take_over(self) -> bool:
        """Takes the launched processes from Lightning's observer, which would kill rank 0, too, unheard.

        The launcher keeps a list of them, as it passes signals on to them; the observer is left an empty one.
        """
        procs = self.launcher.procs
        if len(procs) < self.launcher.num_processes - 1:
            return False
        self.others = list(procs)
        self.launcher.procs = self.others
        procs.clear()
        return True

    def _first_failed(self) -> int | None:
        """Its place in the list, one below its rank on this machine; of several, one that printed no line."""
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
        return RankFailure(f"{self._called(number)} {ending(code)}; {self.remedy()}")

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
                rank.kill()  # what hangs in a collective does not hear SIGTERM
        for rank in self.others:
            rank.wait()

    def _called(self, number: int) -> str:
        rank = self.trainer.global_rank + number + 1
        return f"rank {rank} (pid {self.others[number].pid})"


class _LaunchedRank(_Rank):
    """A process that rank 0 of its machine has launched."""

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
    """Whether a collective says that it cannot reach the other processes.

    By where it was raised, as gloo has many phrases; what DistributedDataParallel sends from within backward
    is known by its words alone.
    """
    if isinstance(error, torch.distributed.DistError):
        return True
    if not isinstance(error, RuntimeError):
        return False
    frames = traceback.extract_tb(error.__traceback__)
    collective = frames and Path(frames[-1].filename).match("torch/distributed/*.py")
    return bool(collective) or any(word in str(error).lower() for word in NETWORK_WORDS)


def reason(error: Exception) -> str:
    """The first sentence of a collective's error, without its place in the source."""
    return re.sub(r"^\[[^\]]*\]\s*", "", str(error)).splitlines()[0].partition(". ")[0]


def ending(code: int) -> str:
    """How a process ended, from its exit code; below 0 the number of a signal."""
    if code >= 0:
        return f"ended with exit code {code}, its message is above"
    name = signal.Signals(-code).name if -code in signal.valid_signals() else f"signal {-code}"
    hint = ", perhaps for want of memory" if -code == signal.SIGKILL else ""
    return f"was killed by {name} (exit code {code}){hint}"


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped (SIGSTOP, a debugger); False where there is no /proc to tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] in "Tt"
