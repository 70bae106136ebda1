"""Tiny trainings that end by a fault, in processes of their own, and what they leave compared bit by bit."""

import csv
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch
from composing import tiny

from metamask_plugin.cli import pretrain
from metamask_plugin.cli.checked import changed
from metamask_plugin.cli.config import complete
from metamask_plugin.methods.base import TaskMethod
from metamask_plugin.training.resume import start_of

ROOT = Path(__file__).resolve().parents[2]
CLOCKS = ("data_wait_share", "train_seconds", "train_cpu_seconds")
"""Metrics that a clock measured: no two runs have the same."""


def config(runs, *overrides, name="metamask_barlow"):
    """Three epochs of four batches, without evaluation."""
    narrow = ["method_kwargs.regularizer.kwargs.width=8"] if name.startswith("icl_msr") else []
    return tiny(runs, "++evaluation.enabled=False", *narrow, *overrides, name=name)


def run_apart(cfg, fault=None, log=None):
    """Trains in a process of its own.

    Args:
        cfg: the composed config.
        fault: called in that process before it trains; patches in what is to go wrong.
        log: file for what it prints.

    Returns:
        Its exit code; that of a signal is negative.
    """

    reading, writing = os.pipe()  # not a file: a fault may be that none can be written

    def main():
        if log is not None:
            sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
        if fault is not None:
            fault()
        pretrain.run(cfg)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    os.close(writing)
    with os.fdopen(reading, errors="replace") as said:
        text = said.read()
    process.join(timeout=300)
    if log is not None:
        log.write_text(text)
    assert process.exitcode is not None, "the training hangs"
    return process.exitcode


def folder_of(cfg, resume=True):
    """Where the run of this config is, or would be."""
    cfg = changed(complete(cfg), "auto_resume.enabled", resume)
    _, model, experiment = pretrain.prepared(cfg)
    return start_of(cfg, experiment, model).folder.path


def signal_myself(number):
    os.kill(os.getpid(), number)


def kill_myself(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def run_folder(runs):
    (folder,) = [path.parent for path in Path(runs).glob("*/*/args.json")]
    return folder


def read(path):
    return torch.load(path, weights_only=True)


def assert_same(found, expected, where="checkpoint"):
    """Two checkpoints, or parts of them, are equal to the last bit."""
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            if key not in CLOCKS:
                assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, (ours, theirs) in enumerate(zip(found, expected)):
            assert_same(ours, theirs, f"{where}[{index}]")
    else:
        assert found == expected, where


def rows(folder):
    """The rows of metrics.csv, without what a clock measured."""
    with (folder / "metrics.csv").open() as file:
        return [{key: row[key] for key in row if key not in CLOCKS} for row in csv.DictReader(file)]


def in_step(step, then):
    """Patches the method: ``then`` happens after the optimiser's ``step``-th step, before the meta step."""
    plain = TaskMethod.on_train_batch_end

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.trainer.global_step == step:
            then()
        plain(self, outputs, batch, batch_idx)

    def patch():
        TaskMethod.on_train_batch_end = on_train_batch_end

    return patch
