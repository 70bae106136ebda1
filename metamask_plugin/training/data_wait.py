"""What an epoch costs, and how much of it the training waits for its data."""

import time

import lightning.pytorch as pl
import torch
from lightning.pytorch.profilers import Profiler


class DataWait(pl.Callback):
    """Logs ``data_wait_share``: of an epoch's training time, the share between a batch's end and the next.

    There the loop asks the loader, moves the batch to the device and makes the views; the share is
    w / (w + s), with w the seconds from the question to the batch's first hook and s those from there to the
    end of its last, the meta step included. Validation, kNN and checkpoints are in neither. An epoch's first
    batch counts: workers start while it is waited for. Of several processes it is the largest share. What
    ``meta.when: epoch_end`` fetches anew after the epoch's last batch counts to s.

    On the CPU w is mostly the views that ``data.pipeline: kornia`` makes in this gap, which is computation as
    much as waiting. On CUDA the host only launches them, and runs ahead, so that its clock tells nothing: the
    times are those of events on the device, and w is the time the device stands idle or makes views.

    Beside it ``train_seconds``, w + s of the epoch, and ``train_cpu_seconds``, the processor time of this
    process (all threads, no workers) over the same spans: what an epoch costs on a machine that does other
    things, too.

    An epoch that is resumed in its middle has the shares and times of its rest.

    Must stand before whatever reads the epoch's metrics.

    Attributes:
        clock: to be handed to the Trainer as its ``profiler``.
    """

    def __init__(self) -> None:
        self.clock = LoopClock()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # an epoch that is resumed in its middle has no start
        self.clock.restart(trainer.strategy.root_device)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.clock.restart(trainer.strategy.root_device)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        waiting, working = self.clock.seconds()
        total = waiting + working
        if total > 0:
            cost = {
                "data_wait_share": waiting / total,
                "train_seconds": total,
                "train_cpu_seconds": self.clock.processor_seconds,
            }
            pl_module.log_dict(cost, reduce_fx="max", sync_dist=trainer.world_size > 1)


class LoopClock(Profiler):
    """Takes the time of each batch at three of the marks that Lightning's loop sets for profilers.

    A profiler, as no callback is called between a batch's last hook, where the meta step is made, and the
    question for the next.

    Attributes:
        processor_seconds: of all batches, from question to end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.restart(torch.device("cpu"))

    def restart(self, device: torch.device) -> None:
        """Forgets all batches; ``device`` is where the next ones are computed."""
        self.device = device
        self._batches: list[tuple] = []
        self._asked = self._began = None
        self.processor_seconds = 0.0

    def start(self, action_name: str) -> None:
        if action_name.endswith(".train_dataloader_next"):
            self._asked, self._processor = self._now(), time.process_time()
        elif action_name == "run_training_batch":
            self._began = self._now()

    def stop(self, action_name: str) -> None:
        of_module = action_name.startswith("[LightningModule]")
        last_hook = of_module and action_name.endswith(".on_train_batch_end")
        if last_hook and self._asked is not None and self._began is not None:
            self._batches.append((self._asked, self._began, self._now()))
            self.processor_seconds += time.process_time() - self._processor
            self._asked = self._began = None

    def seconds(self) -> tuple[float, float]:
        """Of all batches: between question and beginning, and between beginning and end."""
        if self.device.type == "cuda" and self._batches:
            self._batches[-1][-1].synchronize()
        waiting = sum(self._between(asked, began) for asked, began, _ in self._batches)
        working = sum(self._between(began, ended) for _, began, ended in self._batches)
        return waiting, working

    def _now(self) -> float | torch.cuda.Event:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    @staticmethod
    def _between(first: float | torch.cuda.Event, second: float | torch.cuda.Event) -> float:
        if isinstance(first, float):
            return second - first
        return first.elapsed_time(second) / 1000  # milliseconds
