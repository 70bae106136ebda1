"""The share of an epoch spent waiting for data, on a clock that the loop's own parts set forward."""

import lightning.pytorch as pl
import pytest
import torch
from method_training import quiet_trainer
from torch.utils.data import DataLoader, Dataset

from metamask_plugin.training import callbacks
from metamask_plugin.training.callbacks import DataWait, History, Progress
from metamask_plugin.training.run_folder import RunFolder


class Clock:
    """Seconds that pass only when somebody says so."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    monotonic = perf_counter

    def process_time(self):
        """Two threads at work all the time."""
        return 2 * self.now

    def passes(self, seconds):
        self.now += seconds


class Images(Dataset):
    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds

    def __len__(self):
        return 8

    def __getitem__(self, index):
        self.clock.passes(self.seconds)
        return torch.full((3,), float(index))


class Model(pl.LightningModule):
    """One that takes 3 s to transfer a batch, 5 s for a step, 2 s for a meta step, 100 s to validate."""

    def __init__(self, clock):
        super().__init__()
        self.layer, self.clock = torch.nn.Linear(3, 1), clock

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not self.trainer.validating:
            self.clock.passes(3)
        return batch

    def training_step(self, batch, batch_idx):
        self.clock.passes(5)
        return self.layer(batch).mean()

    def on_train_batch_end(self, *args):
        self.clock.passes(2)

    def validation_step(self, batch, batch_idx):
        self.clock.passes(100)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Slow(pl.Callback):
    def __init__(self, clock):
        self.clock = clock

    def on_train_epoch_end(self, trainer, pl_module):
        self.clock.passes(50)


def trained(clock, *callbacks, loading):
    """Two epochs of four batches of two images, each loaded in ``loading`` seconds."""
    measure = DataWait()
    trainer = quiet_trainer(
        max_epochs=2,
        val_check_interval=2,
        num_sanity_val_steps=0,
        callbacks=[measure, Slow(clock), *callbacks],
        profiler=measure.clock,
    )
    trainer.fit(Model(clock), DataLoader(Images(clock, loading), 2), DataLoader(Images(clock, 7), 2))
    return trainer


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(callbacks, "time", clock)
    return clock


def test_loading_transfer_and_views_count_and_validation_and_callbacks_do_not(clock):
    metrics = trained(clock, loading=2.5).callback_metrics
    batch = 2 * 2.5 + 3 + 5 + 2
    assert float(metrics["data_wait_share"]) == pytest.approx((2 * 2.5 + 3) / batch)
    assert float(metrics["train_seconds"]) == pytest.approx(4 * batch)
    assert float(metrics["train_cpu_seconds"]) == pytest.approx(2 * 4 * batch)


def test_the_times_of_a_gpu_are_those_of_its_events(clock, monkeypatch):
    """The same, where the device has a clock of its own: one that is 1000 s ahead of the host's."""
    waited_for = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.time = clock.now + 1000

        def elapsed_time(self, other):
            return 1000 * (other.time - self.time)

        def synchronize(self):
            waited_for.append(self)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    restart = callbacks.LoopClock.restart
    monkeypatch.setattr(callbacks.LoopClock, "restart", lambda self, _: restart(self, torch.device("cuda")))
    monkeypatch.setattr(clock, "perf_counter", None)
    share = trained(clock, loading=2.5).callback_metrics["data_wait_share"]
    assert float(share) == pytest.approx(8 / 15)
    assert len(waited_for) == 2  # once an epoch


def test_an_epoch_without_batches_has_no_share():
    measure = DataWait()
    assert measure.clock.seconds() == (0, 0)
    measure.on_train_epoch_end(None, None)  # would fail if it wanted to log


@pytest.mark.parametrize(("loading", "shown"), [(2.5, "data_wait 53%"), (-1.4, None)])
def test_history_has_the_share_and_the_epoch_line_shows_a_large_one(clock, tmp_path, capsys, loading, shown):
    folder = RunFolder.__new__(RunFolder)
    folder.path = tmp_path
    history = History(folder)
    trained(clock, history, Progress(), loading=loading)
    expected = (2 * loading + 3) / (2 * loading + 10)
    assert [row["data_wait_share"] for row in history.rows] == pytest.approx([expected] * 2)
    assert history.mean("data_wait_share") == pytest.approx(expected)
    assert history.mean("another") is None
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert "data_wait_share" in header.split(",") and len(rows) == 2
    out = capsys.readouterr().out
    assert shown in out if shown else "data_wait" not in out


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_of_a_gpu_measure_its_own_time():
    measure = callbacks.LoopClock()
    measure.restart(torch.device("cuda"))
    a = torch.randn(4096, 4096, device="cuda")
    for _ in range(2):
        measure.start("[_TrainingEpochLoop].train_dataloader_next")
        measure.start("run_training_batch")
        for _ in range(20):
            a @ a
        measure.stop("[LightningModule]Model.on_train_batch_end")
    waiting, working = measure.seconds()
    assert 0 <= waiting < 0.1 * working
