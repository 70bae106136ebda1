"""The project's ``DataLoader``, whose workers leave signals to the process that started them."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Listener
from tempfile import gettempdir
from typing import Any

from torch.utils.data import DataLoader

from metamask_plugin.errors import UserError
from metamask_plugin.signals import SIGNALS, held


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
            return super().__iter__()


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
