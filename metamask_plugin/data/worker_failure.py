"""A DataLoader's worker that died, in one line."""

import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from types import TracebackType

from metamask_plugin.errors import UserError
from metamask_plugin.signals import SIGNALS, Preempted

# torch has two messages: of its handler of SIGCHLD, and of the loop that waits for a batch
DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)


@contextmanager
def worker_failures() -> Iterator[None]:
    """Turns the death of a worker into a :class:`UserError`; everything else passes.

    A worker that a signal has asked to end is no failure: the run is preempted, and says so.

    To stand around whatever runs while workers do: torch raises their death from a signal handler, wherever
    the main thread is.
    """
    try:
        yield
    except Exception as error:
        failure = None if isinstance(error, UserError) else worker_failure(error)
        if failure is None:
            raise
        raise failure from None


def worker_failure(error: BaseException) -> UserError | Preempted | None:
    """Describes the death of a worker; None if ``error`` is of another kind.

    Args:
        error: what was raised. Its context counts, too: the signal comes while the broken pipe of the same
            worker is being handled, or the other way round.
    """
    workers = []
    while error is not None:
        found = DIED.search(str(error)) if isinstance(error, RuntimeError) else None
        if found is not None:
            pids, name = found.groups()
            return _killed(pids, name.strip()) if name else _died(pids, "ended unexpectedly")
        if isinstance(error, ConnectionError | EOFError):
            workers = workers or _workers_at(error.__traceback__)
        error = error.__context__
    return _dead_of(workers)


def _workers_at(place: TracebackType | None) -> list[BaseProcess]:
    """Those of the loader that a traceback passes through."""
    while place is not None:
        if place.tb_frame.f_code.co_filename.endswith("torch/utils/data/dataloader.py"):
            workers = getattr(place.tb_frame.f_locals.get("self"), "_workers", None)
            if workers:
                return list(workers)
        place = place.tb_next
    return []


def _dead_of(workers: list[BaseProcess]) -> UserError | Preempted | None:
    """A broken pipe is seen a moment before the end of who held its other side."""
    until = time.monotonic() + 2
    try:
        while workers and time.monotonic() < until:
            for worker in workers:
                if worker.exitcode and worker.exitcode < 0:
                    return _killed(str(worker.pid), signal.strsignal(-worker.exitcode))
                if worker.exitcode:
                    return _died(str(worker.pid), f"ended with exit code {worker.exitcode}")
            time.sleep(0.05)
    except RuntimeError as signalled:  # torch's handler of SIGCHLD, here as everywhere
        return worker_failure(signalled)
    return None


def _killed(pids: str, name: str) -> UserError | Preempted:
    """Of a worker that a signal of this name, as the C library spells it, has ended."""
    asked = next((number for number in SIGNALS if signal.strsignal(number) == name), None)
    return _died(pids, f"was killed ({name})") if asked is None else Preempted(asked)


def _died(pids: str, how: str) -> UserError:
    return UserError(
        f"a worker that reads images (pid {pids}) {how}: most likely memory has run out, or shared memory "
        "(see df -h /dev/shm; in a container --shm-size); lower data.num_workers (0 reads without workers), "
        "and go on with the same command and auto_resume.enabled=True"
    )
