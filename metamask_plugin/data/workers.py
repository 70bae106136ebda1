"""The project's ``DataLoader``: workers leave signals to the main process, and their death is one line."""

import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Listener
from tempfile import gettempdir
from typing import Any

from torch.utils.data import DataLoader

from metamask_plugin.errors import UserError
from metamask_plugin.signals import SIGNALS, Preempted, held

# torch has two messages: of its handler of SIGCHLD, and of the loop that waits for a batch
DIED = re.compile(
    r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: ([^.]+)|exited unexpectedly)"
)


class ShieldedLoader(DataLoader):
    """A ``DataLoader`` whose workers survive a signal that is sent to all processes of a job.

    SLURM, ``timeout``, containers and terminals signal workers, too. The main process decides what a signal
    means, and still needs the batches that its workers read. Every loader of the project is one of these.
    """

    def __iter__(self) -> Iterator[Any]:
        if self.num_workers == 0:
            return super().__iter__()
        # not in __init__: Lightning seeds the workers by this function only where a loader has none
        if not isinstance(self.worker_init_fn, WorkerStart):
            self.worker_init_fn = WorkerStart(self.worker_init_fn)
        with held():  # a worker inherits that, and is safe until it has shielded itself
            return self._watched(super().__iter__())

    def _watched(self, batches: Any) -> Iterator[Any]:
        """Says of a broken pipe what torch says of a worker's death, which ends up there, too."""
        try:
            yield from batches
        except (ConnectionError, EOFError) as error:
            until = time.monotonic() + 2  # the pipe breaks a moment before the worker is gone
            while time.monotonic() < until:
                for worker in batches._workers:
                    if worker.exitcode:
                        name = signal.strsignal(-worker.exitcode) if worker.exitcode < 0 else None
                        how = f"is killed by signal: {name}" if name else "exited unexpectedly"
                        raise RuntimeError(f"DataLoader worker (pid {worker.pid}) {how}") from error
                time.sleep(0.05)
            raise


class WorkerStart:
    """Shields a worker from signals, then calls the loader's own function; can be pickled.

    Args:
        then: ``worker_init_fn`` of the loader, or None.
    """

    def __init__(self, then: Callable[[int], None] | None) -> None:
        self.then = then

    def __call__(self, worker: int) -> None:
        leave_signals_to_parent()
        if self.then is not None:
            self.then(worker)


def leave_signals_to_parent() -> None:
    """Makes this worker ignore signals, except for a SIGTERM of the process that started it.

    That one is ``Process.terminate()``, with which torch and multiprocessing end a worker that does not
    answer: a worker that ignored it, too, would keep the main process from exiting. A handler is not told
    the sender, so a thread waits for the signal. Otherwise a worker ends by itself when its parent is gone.
    """
    for number in set(SIGNALS) - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS, Windows: SIGTERM stays with torch's handler
        if hasattr(signal, "pthread_sigmask"):
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # for the thread, too, which inherits it
    parent = multiprocessing.parent_process().pid
    threading.Thread(target=_end_when_terminated, args=(parent,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, set(SIGNALS) - {signal.SIGTERM})


def _end_when_terminated(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def check_worker_sockets() -> None:
    """Raises a UserError where workers cannot send their batches.

    They pass file handles through Unix sockets in the folder of temporary files. If none can be made there,
    for instance because the path is too long, a thread of the worker fails and the main process waits for
    ever.
    """
    if not hasattr(signal, "pthread_sigmask"):
        return  # Windows has other means
    try:
        Listener(family="AF_UNIX").close()
    except OSError as error:
        raise UserError(
            f"TMPDIR must be a folder in which workers can make sockets, got {gettempdir()!r} ({error}); set "
            "TMPDIR=/tmp, or data.num_workers=0"
        ) from None


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


def worker_failure(error: BaseException | None) -> UserError | Preempted | None:
    """Describes the death of a worker; None if ``error`` is of another kind.

    Args:
        error: what was raised; its context counts, too.
    """
    while error is not None:
        found = DIED.search(str(error)) if isinstance(error, RuntimeError) else None
        if found is not None:
            return _died(*found.groups())
        error = error.__context__
    return None


def _died(pids: str, signal_name: str | None) -> UserError | Preempted:
    """Of a worker that ended by itself, or by a signal of this name, as the C library spells it."""
    name = (signal_name or "").strip()
    asked = next((number for number in SIGNALS if signal.strsignal(number) == name), None)
    if asked is not None:
        return Preempted(asked)
    how = f"was killed ({name})" if name else "ended unexpectedly"
    return UserError(
        f"a worker that reads images (pid {pids}) {how}: most likely memory has run out, or shared memory "
        "(see df -h /dev/shm; in a container --shm-size); lower data.num_workers (0 reads without workers), "
        "and go on with the same command and auto_resume.enabled=True"
    )
