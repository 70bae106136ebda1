"""Lightning's loop around one batch, without Lightning: a method's own hooks, in Lightning's order.

So what is timed is what trains, in any setting of the method, while one process alternates between methods
batch by batch.
"""

from contextlib import nullcontext
from typing import Any

import lightning.pytorch as pl
import torch

from metamask_plugin.bilevel import Estimator

PRECISIONS = ("float32", "tf32", "bf16")


class _Strategy:
    """One process."""

    world_size = 1

    def reduce(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor


class _Trainer:
    """What the hooks ask of a trainer in the middle of an epoch."""

    world_size = 1
    num_devices = num_nodes = 1
    is_last_batch = False
    is_global_zero = True
    sanity_checking = False
    estimated_stepping_batches = num_training_batches = 1_000_000
    accumulate_grad_batches = 1
    current_epoch = global_rank = 0
    precision_plugin = None
    gradient_clip_val = gradient_clip_algorithm = None

    def __init__(self, precision: str, device: torch.device):
        self.global_step = 0
        self.precision = "bf16-mixed" if precision == "bf16" else "32-true"
        self.strategy = _Strategy()
        self.strategy.root_device = device


class Loop:
    """Trains a method on one batch, over and over.

    Args:
        model: a method of this package, on its device.
        views: of the batch, (N, 3, H, W) each.
        precision: of the regular step: ``bf16`` is Lightning's ``bf16-mixed``. The meta step's own is a
            setting of the method.
        estimator: takes the place of the configured one.

    Attributes:
        model: the method.
        optimizer: the main one.
        meta_every: iterations from one meta step to the next; 0 without one.
    """

    def __init__(
        self,
        model: pl.LightningModule,
        views: list[torch.Tensor],
        precision: str = "float32",
        estimator: Estimator | None = None,
    ):
        self.model, self.precision = model.train(), precision
        self.trainer = _Trainer(precision, views[0].device)
        model._trainer = self.trainer
        model.log = model.log_dict = lambda *args, **kwargs: None
        self.optimizer = model.configure_optimizers()
        model.optimizers = lambda use_pl_optimizer=True: self.optimizer
        count, on = len(views[0]), views[0].device
        labels = torch.arange(count, device=on) % model.num_classes
        self.batch = [torch.arange(count, device=on), views, labels]
        self.number = 0
        model.setup("fit")
        model.on_fit_start()
        model.on_train_start()
        model.on_train_epoch_start()
        meta = getattr(model, "meta", None)
        if estimator is not None:
            meta.estimator = estimator
        self.meta_every: int = 0 if meta is None else meta.cfg.every_n_steps

    def autocast(self):
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.batch[1][0].device.type, torch.bfloat16)

    def step(self) -> None:
        """One iteration, with its meta step where one is due."""
        model, number = self.model, self.number
        model.on_train_batch_start(self.batch, number)
        with self.autocast():
            loss = model.training_step(self.batch, number)
        model.on_before_zero_grad(self.optimizer)
        self.optimizer.zero_grad()
        model.on_before_backward(loss)
        loss.backward()
        model.on_after_backward()
        model.on_before_optimizer_step(self.optimizer)
        self.optimizer.step()
        self.trainer.global_step += 1
        model.on_train_batch_end(loss, self.batch, number)
        self.number += 1

    def cycle(self) -> None:
        """As many iterations as it takes for one meta step; one iteration without any."""
        for _ in range(max(1, self.meta_every)):
            self.step()

    def resident(self) -> list[torch.Tensor]:
        """All tensors that are there between two iterations."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.batch[1]]
        tensors += [p.grad for p in self.model.parameters() if p.grad is not None]
        optimizers = [self.optimizer]
        if getattr(self.model, "meta", None) is not None:
            optimizers.append(self.model.meta.optimizer)
        for optimizer in optimizers:
            for state in optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
        return tensors
