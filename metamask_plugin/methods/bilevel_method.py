"""What both methods share: when the meta step happens, and what of it a checkpoint keeps."""

from abc import abstractmethod
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from metamask_plugin.host import BaseMethod
from metamask_plugin.host.optimizers import build_warmup_step
from metamask_plugin.methods.meta_update import MetaUpdate


class BilevelMethod(BaseMethod):
    """A method whose regular step Lightning optimises, followed by a meta step on other parameters.

    The regular step is ``training_step``'s loss under automatic optimisation, so that precision,
    clipping, accumulation and schedules work as everywhere. The meta step comes right after the
    optimiser's, on the same batch; with ``meta.schedule: epoch``, for all batches after the epoch's last.

    Subclasses set :attr:`meta` and say what is meta-trained, how, and what to log of it.

    Attributes:
        meta: the meta step's state; None where there is none.
    """

    meta: MetaUpdate | None

    @abstractmethod
    def meta_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the meta optimiser trains."""

    @abstractmethod
    def meta_step(self, batch: list) -> None:
        """One meta step on one batch, as the data module gives it."""

    @abstractmethod
    def meta_state(self) -> dict[str, torch.Tensor]:
        """Scalars to log about the meta parameters, as an epoch leaves them."""

    def configure_optimizers(self):
        """The host's, and for either host the schedule ``warmup_step``, which ICL-MSR trains with."""
        scheduler = self.cfg.scheduler
        if scheduler.name != "warmup_step":
            return super().configure_optimizers()
        self.scheduler = "none"  # the host builds the optimiser alone
        optimizer = super().configure_optimizers()
        self.scheduler = scheduler.name
        schedule = build_warmup_step(
            optimizer,
            warmup_steps=OmegaConf.select(scheduler, "warmup_steps", default=0),
            steps_per_epoch=self.trainer.estimated_stepping_batches / self.max_epochs,
            max_epochs=self.max_epochs,
            lr_decay_steps=scheduler.lr_decay_steps,
            decay_factor=OmegaConf.select(scheduler, "decay_factor", default=0.1),
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def on_train_start(self) -> None:
        super().on_train_start()
        self._last_step = self.trainer.global_step
        if self.meta is not None:
            self.meta.start(self.meta_parameters(), self.optimizers(use_pl_optimizer=False))

    def on_train_batch_end(self, outputs: Any, batch: list, batch_idx: int) -> None:
        """Makes the meta step once the optimiser has stepped (gradient accumulation may skip it)."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        step, stepped = self.trainer.global_step, self.trainer.global_step > self._last_step
        self._last_step = step
        if self.meta is not None:
            if self.meta.per_epoch and self.trainer.is_last_batch:
                self._meta_epoch()
            elif not self.meta.per_epoch and stepped and self.meta.due(step):
                self.meta_step(batch)
        if self.trainer.is_last_batch:  # as the epoch leaves it, not its mean over the epoch
            self.log_dict(self.meta_state(), on_step=False, on_epoch=True)

    def _meta_epoch(self) -> None:
        """Algorithm 1's second loop: the epoch's images once more, in the same order."""
        batches = islice(self.trainer.train_dataloader, self.trainer.num_training_batches)
        for number, batch in enumerate(batches, start=1):
            if self.meta.due(number):
                self.meta_step(self.trainer.strategy.batch_to_device(batch))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.meta is not None:
            checkpoint["meta_optimizer"] = self.meta.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.meta is not None:
            self.meta.load_state_dict(checkpoint.get("meta_optimizer"))
