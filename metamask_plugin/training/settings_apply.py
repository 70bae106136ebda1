"""Applies the config's learning rate and its like to an optimiser whose state is another run's."""

import warnings
from typing import Any

import lightning.pytorch as pl
from torch.optim.lr_scheduler import LambdaLR, LRScheduler


class SettingsApply(pl.Callback):
    """Gives a resumed optimiser the settings of the config, where the checkpoint has others.

    A checkpoint holds its optimiser's learning rate, weight decay and the like, and they replace the config's
    when it is loaded. Which of them differ is said before; here the config's apply from the next step on, at
    the place of the schedule that the run has reached.
    """

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._wanted = [[_settings(group) for group in one.param_groups] for one in trainer.optimizers]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.ckpt_path is None:
            return
        schedules = {
            id(config.scheduler.optimizer): config.scheduler for config in trainer.lr_scheduler_configs
        }
        for optimizer, wanted in zip(trainer.optimizers, self._wanted):
            groups, schedule = optimizer.param_groups, schedules.get(id(optimizer))
            changed = [_base(group) for group in groups] != [_base(settings) for settings in wanted]
            for group, settings in zip(groups, wanted):
                group |= {key: value for key, value in settings.items() if key != "lr"}
            if schedule is None:
                rates = [_base(settings) for settings in wanted]
            elif changed or isinstance(schedule, LambdaLR):  # whose shape is the config's, too
                schedule.base_lrs = [_base(settings) for settings in wanted]
                rates = schedule._last_lr = _rates(schedule)
            else:
                continue
            for group, rate in zip(groups, rates):
                group["lr"] = rate


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key != "params"}


def _base(group: dict[str, Any]) -> float:
    """A group's learning rate before any schedule."""
    return group.get("initial_lr", group["lr"])


def _rates(schedule: LRScheduler) -> list[float]:
    """The learning rates of a schedule at the place that it has reached, from its base rates."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch asks for get_last_lr, which knows the old rates
        closed_form = getattr(schedule, "_get_closed_form_lr", schedule.get_lr)
        return list(closed_form())
