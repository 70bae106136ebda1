"""A run that was killed goes on as if nothing had happened: bit by bit, in all that a checkpoint holds."""

import os
import signal

import pytest
import torch
from killed_runs import (
    assert_same,
    config,
    in_step,
    kill_myself,
    read,
    rows,
    run_apart,
    run_folder,
    signal_myself,
)

from metamask_plugin import signals
from metamask_plugin.methods.numeric_guard import NumericGuard
from metamask_plugin.training.checkpoints import Checkpointer

CONFIGS = {
    "MetaMask over SimCLR": (),
    "a queue, a target network": ("task=moco",),
    "multi-crop queues, prototypes": ("task=swav", "method_kwargs.task_kwargs.queue_size=64"),
    "ICL-MSR": ("icl_msr_simclr",),
    "meta steps at the epoch's end": ("method_kwargs.meta.when=epoch_end",),
    "meta and regular step in one pass": ("method_kwargs.meta.when=before_step",),
    "accumulated gradients": ("accumulate_grad_batches=2",),
    "views by workers": ("++data.pipeline=torchvision", "data.num_workers=2"),
    "views in the main process": ("++data.pipeline=torchvision", "data.num_workers=0"),
}

QUICK = ("a queue, a target network", "ICL-MSR")
"""Those that the test command runs besides the first."""


def config_of(name, runs, *more):
    overrides = CONFIGS[name]
    if overrides and "=" not in overrides[0]:
        return config(runs, *overrides[1:], *more, name=overrides[0])
    return config(runs, *overrides, *more)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The run folder of a config that nothing has happened to; each is trained once."""
    folders = {}

    def folder_of(name):
        if name not in folders:
            runs = tmp_path_factory.mktemp("whole")
            assert run_apart(config_of(name, runs)) == 0
            folders[name] = run_folder(runs)
        return folders[name]

    return folder_of


def assert_as_uninterrupted(folder, whole):
    assert_same(read(folder / "last.ckpt"), read(whole / "last.ckpt"))
    assert rows(folder) == rows(whole)
    assert not list(folder.glob("**/*.part"))


def in_meta_step():
    plain = NumericGuard.before_meta_step

    def before_meta_step(self, method, *arguments):
        if method.trainer.global_step == 6:
            kill_myself()
        return plain(self, method, *arguments)

    NumericGuard.before_meta_step = before_meta_step


def when_saving(epoch, then):
    """Patches the checkpointer: ``then`` happens when the checkpoint after ``epoch`` epochs is due."""
    plain = Checkpointer.on_train_epoch_end

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch + 1 == epoch:
            then()
        plain(self, trainer, pl_module)

    def patch():
        Checkpointer.on_train_epoch_end = on_train_epoch_end

    return patch


def half_written():
    plain = torch.save

    def save(content, file):
        plain(content, file)
        file.file.truncate(file.file.tell() // 2)
        file.flush()
        kill_myself()

    torch.save = save


def before_the(rename):
    def patch():
        plain, count = os.replace, [0]

        def replace(source, target):
            if str(target).endswith(".ckpt"):
                count[0] += 1
                if count[0] == rename:
                    kill_myself()
            plain(source, target)

        os.replace = replace

    return patch


KILLS = {
    "in the first epoch": in_step(2, kill_myself),
    "in the middle of an epoch": in_step(6, kill_myself),
    "after the last batch of an epoch": in_step(8, kill_myself),
    "in a meta step": in_meta_step,
    "before a checkpoint": when_saving(2, kill_myself),
    "in the middle of a checkpoint": when_saving(2, half_written),
    "before the last becomes the previous": when_saving(2, before_the(1)),
    "between the previous and the last": when_saving(2, before_the(2)),
}


@pytest.mark.fault("resume")
@pytest.mark.parametrize("kill", KILLS)
def test_killed_anywhere(tmp_path, uninterrupted, kill):
    cfg = config_of("MetaMask over SimCLR", tmp_path)
    assert run_apart(cfg.copy(), KILLS[kill]) == -signal.SIGKILL
    assert run_apart(cfg.copy()) == 0
    assert_as_uninterrupted(run_folder(tmp_path), uninterrupted("MetaMask over SimCLR"))


@pytest.mark.fault("resume")
@pytest.mark.parametrize(
    "name",
    [
        name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
        for name in CONFIGS
        if name != "MetaMask over SimCLR"
    ],
)
def test_killed_in_the_middle_of_an_epoch_and_saved_there(tmp_path, uninterrupted, name):
    """The run has a checkpoint of every second step; that of the sixth is the one to go on from."""
    cfg = config_of(name, tmp_path, "++checkpoint.every_n_steps=1")
    accumulated = cfg.get("accumulate_grad_batches") or 1
    steps = 12 // accumulated
    assert run_apart(cfg.copy(), in_step(steps // 2 + 1, kill_myself)) == -signal.SIGKILL
    saved = read(run_folder(tmp_path) / "last.ckpt")
    assert saved["global_step"] == steps // 2 and saved["batches_done"] == 2
    assert run_apart(cfg.copy()) == 0
    assert_as_uninterrupted(run_folder(tmp_path), uninterrupted(name))


@pytest.mark.fault("resume")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_in_the_middle_of_an_epoch_and_ends(tmp_path, uninterrupted, number):
    cfg = config_of("MetaMask over SimCLR", tmp_path)
    log = tmp_path / "log.txt"
    assert run_apart(cfg.copy(), in_step(6, lambda: signal_myself(number)), log) == 128 + number
    text = log.read_text()
    assert "Traceback" not in text
    assert f"{signal.Signals(number).name} in epoch 2 of 3; resume with" in text
    saved = read(run_folder(tmp_path) / "last.ckpt")
    assert saved["global_step"] == 6 and saved["batches_done"] == 2
    assert run_apart(cfg.copy()) == 0
    assert_as_uninterrupted(run_folder(tmp_path), uninterrupted("MetaMask over SimCLR"))


@pytest.mark.fault("resume")
def test_a_signal_while_an_epoch_ends_saves_that_epoch(tmp_path, uninterrupted):
    cfg = config_of("MetaMask over SimCLR", tmp_path, "checkpoint.frequency=3")
    term = when_saving(2, lambda: signal_myself(signal.SIGTERM))
    assert run_apart(cfg.copy(), term) == 128 + signal.SIGTERM
    assert read(run_folder(tmp_path) / "last.ckpt")["global_step"] == 8
    assert run_apart(cfg.copy()) == 0
    assert_as_uninterrupted(run_folder(tmp_path), uninterrupted("MetaMask over SimCLR"))


@pytest.mark.fault("resume")
def test_a_second_signal_ends_at_once(tmp_path):
    def twice():
        signals.APART_SECONDS = -1  # else the second would be the first, passed on by a launcher
        signal_myself(signal.SIGINT)
        signal_myself(signal.SIGINT)

    cfg = config_of("MetaMask over SimCLR", tmp_path)
    assert run_apart(cfg.copy(), in_step(6, twice), tmp_path / "log.txt") == 130
    assert "Traceback" not in (tmp_path / "log.txt").read_text()
    assert read(run_folder(tmp_path) / "last.ckpt")["global_step"] == 4


@pytest.mark.load("10 kills in one training")
@pytest.mark.slow
def test_killed_at_every_step(tmp_path, uninterrupted):
    """Killed in every one of its steps, again and again: the training ends, and as it should."""
    cfg = config_of("MetaMask over SimCLR", tmp_path, "++checkpoint.every_n_steps=1")
    for step in range(2, 12):
        assert run_apart(cfg.copy(), in_step(step, kill_myself)) == -signal.SIGKILL
    assert run_apart(cfg.copy()) == 0
    assert_as_uninterrupted(run_folder(tmp_path), uninterrupted("MetaMask over SimCLR"))
