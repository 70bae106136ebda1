"""Stopping when the machine is wanted back: SIGTERM, SIGUSR1 (SLURM's warning), Ctrl-C."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name)
)  # Windows has no SIGUSR1


class Preempted(BaseException):
    """Ends a training between two batches, after it was saved.

    Not an ``Exception``: nothing on the way is to take it for an error of its own.

    Attributes:
        signal: what asked for it.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.signal = signal.Signals(number)


class Preemption(pl.Callback):
    """Takes the signals while a training runs; the second one ends it at once.

    The first is only written down: a batch, with its meta step, is finished, and the training is saved before
    it ends (:class:`~metamask_plugin.training.checkpointer.Checkpointer`). Several processes stop together,
    whichever of them was told.

    Attributes:
        received: the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # here, after Lightning has installed its own, which end a run without saving it
        if threading.current_thread() is threading.main_thread():  # no other may
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def asked_to_stop(self, trainer: pl.Trainer) -> int | None:
        """The signal upon which all processes are to stop now, or None. Every process must ask."""
        if trainer.world_size == 1:
            return self.received
        stops = trainer.strategy.reduce_boolean_decision(self.received is not None, all=False)
        return (self.received or signal.SIGTERM) if stops else None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            self._restore()
            raise KeyboardInterrupt
        self.received = number
        print(
            f"{signal.Signals(number).name}: finishing this batch, then saving; again to stop at once",
            flush=True,
        )

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
