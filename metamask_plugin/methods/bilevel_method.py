"""What both methods share: when the meta step happens, and what of it a checkpoint keeps."""

from abc import abstractmethod
from collections.abc import Iterable
from itertools import islice
from typing import Any

import torch
from torch import nn

from metamask_plugin.methods.meta_update import MetaUpdate
from metamask_plugin.methods.task_method import TaskMethod


class BilevelMethod(TaskMethod):
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

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.meta is not None:
            self.task.check_meta_step(self.trainer.world_size)
            self.meta.start(self.meta_parameters(), self.optimizers(use_pl_optimizer=False))

    def meta_stage(self, batch: list, stepped: bool) -> None:
        """The meta step, once the optimiser has stepped (gradient accumulation may skip it)."""
        if self.meta is not None:
            if self.meta.per_epoch and self.trainer.is_last_batch:
                self._meta_epoch()
            elif not self.meta.per_epoch and stepped and self.meta.due(self.trainer.global_step):
                self.meta_step(batch)
        if self.trainer.is_last_batch:  # as the epoch leaves it, not its mean over the epoch
            self.log_dict(self.meta_state(), on_step=False, on_epoch=True)

    def _meta_epoch(self) -> None:
        """Algorithm 1's second loop: the epoch's images once more, in the same order."""
        batches = islice(self.trainer.train_dataloader, self.trainer.num_training_batches)
        for number, batch in enumerate(batches):
            if self.meta.due(number + 1):
                indexes, views, labels = self.trainer.strategy.batch_to_device(batch)
                self.task.observe(indexes, labels, number)
                self.meta_step([indexes, views, labels])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.meta is not None:
            checkpoint["meta_optimizer"] = self.meta.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.meta is not None:
            self.meta.load_state_dict(checkpoint.get("meta_optimizer"))
