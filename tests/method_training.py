"""A Trainer on random views, for whoever tests a method."""

import math

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset

from metamask_plugin.bilevel import EncoderPass, Tape
from metamask_plugin.bilevel.problem import leaves
from metamask_plugin.methods.base import TaskMethod


class Views(Dataset):
    """Two noisy views of fixed random images, and the un-augmented one where it is asked for."""

    def __init__(self, count=24, original=False):
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(count, 2, 3, 32, 32, generator=generator)
        self.originals = torch.randn(count, 3, 36, 36, generator=generator) if original else None

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        views = list(self.images[index])
        return index, views if self.originals is None else [*views, self.originals[index]], index % 10


def quiet_trainer(**kwargs):
    """A trainer of one epoch on the CPU that writes and prints nothing."""
    defaults = {"accelerator": "cpu", "max_epochs": 1, "logger": False, "enable_checkpointing": False}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(**{**defaults, **quiet, **kwargs})


def train(model, steps=3, callbacks=(), original=False, checkpoint=None, **kwargs):
    """Trains for one epoch of ``steps`` batches of 8, or goes on from a checkpoint; returns the trainer."""
    trainer = quiet_trainer(limit_train_batches=steps, callbacks=list(callbacks), **kwargs)
    trainer.fit(model, DataLoader(Views(original=original), batch_size=8), ckpt_path=checkpoint)
    return trainer


def shared_pass(problem):
    """A recorded pass through a problem's encoder, as the regular step makes it for the meta step."""
    theta, tape = leaves(problem.encoder_params), Tape()
    with problem.eager(), tape.recording():
        return EncoderPass(problem.first_order_encode(theta), theta, tape, shared=True)


def spoil_the_classifier(monkeypatch, step=1):
    """Makes the online classifier's gradient NaN in one step, counted from 0."""
    plain = TaskMethod.on_after_backward

    def on_after_backward(self):
        plain(self)
        if self.trainer.global_step == step:
            self.classifier.weight.grad[0, 0] = math.nan

    monkeypatch.setattr(TaskMethod, "on_after_backward", on_after_backward)
