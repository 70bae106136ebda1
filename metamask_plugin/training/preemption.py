"""Saves and ends a training when a signal asks for that: SIGTERM, SIGUSR1, SIGUSR2, SIGHUP, Ctrl-C."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import lightning.pytorch as pl

from metamask_plugin.data.batches import EpochPosition
from metamask_plugin.data.worker_failure import worker_failure
from metamask_plugin.signals import Preempted, install, is_first_process, restore

APART_SECONDS = 1.0
"""Within which a second signal is the first again: a launcher passes on what its processes received, too."""

BATCH_SECONDS = 30.0
"""After which a run that has been asked to end does not wait for its next batch any longer."""


class Preemption(pl.Callback):
    """Takes the signals while a training runs; the second one ends it at once.

    The first is only noted. The training finishes the batch and its meta step, saves, and ends
    (:class:`~metamask_plugin.training.checkpointer.Checkpointer`). If the next batch does not come within
    :data:`BATCH_SECONDS`, the training ends without it. Several processes stop together, whichever received
    the signal.

    Args:
        position: of the run's data module; tells whether the run waits for a batch.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self, position: EpochPosition | None = None) -> None:
        self.received: int | None = None
        self.position = position
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # here, after Lightning has installed its own, which end a run without saving it
        self._before = install(self._receive)

    def asked_to_stop(self, trainer: pl.Trainer) -> int | None:
        """The signal upon which all processes are to stop now, or None. Every process must ask."""
        if trainer.world_size == 1:
            return self.received
        stops = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        return (self.received or signal.SIGTERM) if stops else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
            if is_first_process():
                name = signal.Signals(number).name
                print(f"{name}: finishing this batch, then saving; again to stop at once", flush=True)
            if self.position is not None:
                timer = threading.Timer(BATCH_SECONDS, self._end_waiting, [self.position.waiting_for])
                timer.daemon = True
                timer.start()
        elif time.monotonic() - self._since > APART_SECONDS:
            self._restore()
            raise Preempted(number)

    def _end_waiting(self, batch: int | None) -> None:
        """Repeats the signal if the run still waits for the same batch."""
        if batch is not None and self._before and self.position.waiting_for == batch:
            signal.pthread_kill(threading.main_thread().ident, self.received)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()
        number = self.asked_to_stop(trainer)
        if number is not None:  # everything is saved; the final report is left to the next start
            raise Preempted(number)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        restore(self._before)
        self._before = {}


@contextmanager
def preemption_told_from_failure(trainer: pl.Trainer) -> Iterator[None]:
    """Raises :class:`Preempted` for a worker that dies after the run has been asked to end."""
    try:
        yield
    except Exception as error:
        callbacks = [callback for callback in trainer.callbacks if isinstance(callback, Preemption)]
        received = callbacks[0].received if callbacks else None
        if received is None or worker_failure(error) is None:
            raise
        raise Preempted(received) from None
