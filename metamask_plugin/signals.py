"""The signals that ask a process to end, and how a command or a training ends upon one."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
    if hasattr(signal, name)
)  # Windows has the first two

APART_SECONDS = 1.0
"""A second signal within this time counts as the first, which a launcher may have forwarded."""

BATCH_SECONDS = 30.0
"""How long a training that was asked to end waits for its next batch."""

RANK_VARIABLES = ("RANK", "LOCAL_RANK", "SLURM_PROCID")
"""Set by torchrun, Lightning and SLURM to the number of a process."""


class Preempted(BaseException):
    """Ends a run that a signal has asked to end.

    Not an ``Exception``: no handler of errors may take it for one.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)

    @property
    def exit_code(self) -> int:
        return 128 + self.signal


def exit_code(stop: BaseException) -> Any:
    """Of a process that this exception ends: 128 + the signal, or what a ``SystemExit`` says."""
    if isinstance(stop, SystemExit):
        return stop.code
    return stop.exit_code if isinstance(stop, Preempted) else 128 + signal.SIGINT


def install(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Sets the handler of all signals; only the main thread can.

    A SIGHUP that is ignored stays ignored: ``nohup`` asks for that.

    Returns:
        The handlers before, for :func:`restore`.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is not None and signal.getsignal(hangup) == signal.SIG_IGN
    return {
        number: signal.signal(number, handler) for number in SIGNALS if not (ignored and number == hangup)
    }


def restore(before: dict[int, Any]) -> None:
    """Sets the handlers that :func:`install` has replaced; those of C stay replaced by the default."""
    for number, handler in before.items():
        signal.signal(number, signal.SIG_DFL if handler is None else handler)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Within it a signal raises :class:`Preempted`, which ends the command with one line and 128 + signal.

    Of several processes the first prints the line.
    """
    before = install(_end)
    try:
        with held():
            pass  # a resource tracker that starts here survives what ends this process
        yield
    except Preempted as preempted:
        if is_first_process():
            print(f"{preempted.signal.name}: interrupted; start it again with the same command", flush=True)
        raise SystemExit(preempted.exit_code) from None
    finally:
        restore(before)


def _end(number: int, frame: FrameType | None) -> None:
    raise Preempted(number)


class Preemption:
    """Takes the signals while a training runs. The first is noted, the second ends the training at once.

    After the first signal the training is expected to finish its batch, save and end
    (:class:`~metamask_plugin.training.checkpoints.Checkpointer` does so). If its next batch does not come
    within :data:`BATCH_SECONDS`, the training ends without it.

    Args:
        waiting_for: returns the number of the batch that the training waits for; None while it has one.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, waiting_for: Callable[[], int | None]) -> None:
        self.waiting_for = waiting_for
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        self._before = install(self._receive)

    def restore(self) -> None:
        restore(self._before)
        self._before = {}

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if is_first_process():
                name = signal.Signals(number).name
                print(f"{name}: finishing this batch, then saving; again to stop at once", flush=True)
            timer = threading.Timer(BATCH_SECONDS, self._end_waiting, [self.waiting_for()])
            timer.daemon = True
            timer.start()
        elif time.monotonic() - self._since > APART_SECONDS:
            self.restore()
            raise Preempted(number)

    def _end_waiting(self, batch: int | None) -> None:
        """Repeats the signal if the training still waits for the same batch."""
        if batch is not None and self._before and self.waiting_for() == batch:
            signal.pthread_kill(threading.main_thread().ident, self.received)


@contextmanager
def held() -> Iterator[None]:
    """Blocks the signals in this thread, and in the processes that it starts.

    multiprocessing starts processes of its own where workers are not forked: the resource tracker here, the
    fork server with the first worker.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        methods = multiprocessing.get_all_start_methods()
        if (multiprocessing.get_start_method(allow_none=True) or methods[0]) != "fork":
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # it unblocks SIGTERM and SIGINT here
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def is_first_process() -> bool:
    """Whether this is the first, or the only one, of the processes that train together."""
    return all(os.environ.get(name, "0") in ("", "0") for name in RANK_VARIABLES)
