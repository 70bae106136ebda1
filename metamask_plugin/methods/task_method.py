"""What every method of this package shares: a task on the host's encoder, and what happens to it when."""

import copy
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metamask_plugin import host
from metamask_plugin.bilevel import DistributedBatch, Functional, OneProcess, Processes, joined
from metamask_plugin.errors import check, choose
from metamask_plugin.host import BaseMethod
from metamask_plugin.host.optimizers import build_warmup_step
from metamask_plugin.host.solo_settings import is_solo_task, own_settings
from metamask_plugin.host.solo_task import SoloTask
from metamask_plugin.methods.numeric_guard import DEFAULTS as NUMERICS
from metamask_plugin.methods.numeric_guard import NumericGuard
from metamask_plugin.methods.schedule_position import SchedulePosition
from metamask_plugin.modules.compiled import MODES, CompiledForward
from metamask_plugin.modules.feature_spread import feature_std
from metamask_plugin.renamed import with_new_names
from metamask_plugin.tasks import Projections, Task, build_task

MATMUL_PRECISIONS = ("highest", "high", "medium")


class TaskMethod(BaseMethod):
    """A method whose regular loss is made of a task's projections.

    One iteration: the regular loss of a batch; the optimiser's step; :meth:`meta_stage`, which sees queues
    and target network as the regular loss did; then, once, the task's ``after_batch`` and ``after_step``.

    A last view that is un-augmented (see :func:`original_pipeline`) is ICL-MSR's; the task never sees it,
    so that a task alone and with a plugin trains on the same views of the same config.

    Args:
        cfg: the host's configuration; ``method_kwargs`` has ``task`` and ``task_kwargs``.
    """

    def __init__(self, cfg: DictConfig):
        super().__init__(cfg)
        self.original = original_pipeline(self.cfg)
        if self.original is not None:  # the host does not count it among the views
            self.num_small_crops -= 1
            self.num_crops -= 1
            self.multicrop = self.num_small_crops > 0
        self.task = self._build_task()
        self.task.start_target(self.backbone)
        self.task.large_views = self.num_large_crops
        self.compiled: CompiledForward | None = None
        self.guard = NumericGuard(self.cfg)
        self.position = SchedulePosition()

    def _build_task(self) -> Task:
        kwargs = self.cfg.method_kwargs
        if is_solo_task(kwargs.task):
            return SoloTask(self.cfg, self.features_dim, (self.num_large_crops, self.num_small_crops))
        return build_task(kwargs.task, self.features_dim, OmegaConf.to_container(kwargs.task_kwargs))

    @staticmethod
    def add_and_assert_specific_cfg(cfg: DictConfig) -> DictConfig:
        """Adds the host's defaults, and a task's own where that is a method of solo-learn."""
        cfg = with_new_names(super(TaskMethod, TaskMethod).add_and_assert_specific_cfg(cfg))
        choose("performance.compile", str(OmegaConf.select(cfg, "performance.compile") or False), MODES)
        precision = OmegaConf.select(cfg, "performance.matmul_precision")
        if precision is not None:
            choose("performance.matmul_precision", precision, MATMUL_PRECISIONS)
        cfg.host = host.name  # evaluators ask: the hosts' encoders of one name differ
        if is_solo_task(cfg.method_kwargs.get("task")):
            cfg.method_kwargs.task_kwargs = own_settings(cfg)
        return cfg

    @property
    def resumes_within_epoch(self) -> bool:
        """Whether a checkpoint from the middle of an epoch holds all that the rest of it depends on."""
        return self.task.resumes_within_epoch

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds the task's heads; a target network follows them and is not trained."""
        return [*super().learnable_params, *self.task.parameter_groups()]

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """Adds, in evaluation, the task's projection ``z``.

        In training the loss makes its own projections, so that the heads' BatchNorm sees them once.
        """
        out = super().forward(X)
        if not self.training:
            out["z"] = self.task.project(out["feats"])
        return out

    @abstractmethod
    def regular_loss(
        self,
        out: dict[str, list[torch.Tensor]],
        target_feats: list[torch.Tensor] | None,
        original: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], tuple[Projections, Projections | None]]:
        """The loss that the main optimiser descends, for one batch.

        Args:
            out: what :meth:`forward` gave, one entry a view, large crops first: ``feats`` (N, D), of the
                joint batch of all processes.
            target_feats: the target network's features of the large crops, (N, D) each, of the joint batch;
                None without one.
            original: un-augmented images (N, 3, H, W), where the data come with them; of this process.

        Returns:
            The loss; its parts, to log; the task's projections and targets, for its queues.
        """

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        """The regular loss, plus the online classifier's."""
        indexes, views, targets = batch
        views, original = self.separate(views)
        self.guard.start_batch(self, indexes, views)
        self.task.observe(indexes, targets, batch_idx)
        out = self.host_step([indexes, views, targets], batch_idx)
        self._target_feats = self.target_features(views)
        self.before_regular_loss(batch, out, self._target_feats, batch_idx)
        self.task.start_regular_loss()
        for key in ("feats", "maps"):  # no set: all processes must gather in one order
            if key in out:
                out[key] = self.joint_batch(out[key])
        loss, metrics, (projections, task_targets) = self.regular_loss(out, self._target_feats, original)
        self._branches = _detached(projections), None if task_targets is None else _detached(task_targets)
        metrics["train_loss"] = loss
        self.guard.observe({**metrics, "train_class_loss": out["loss"]})
        metrics["feature_std"] = feature_std(torch.cat(list(out["feats"][: self.num_large_crops])).detach())
        self.batch_metrics, self._samples = metrics, len(indexes)  # logged once the step has been made
        return loss + out["loss"]

    def host_step(self, batch: list, batch_idx: int) -> dict[str, Any]:
        """The host's part of a training step: features, and the online classifier."""
        return super().training_step(batch, batch_idx)

    def before_regular_loss(
        self, batch: list, out: dict[str, Any], target_feats: list[torch.Tensor] | None, batch_idx: int
    ) -> None:
        """What a bi-level method does with a batch's features before the regular loss.

        Args:
            batch: as the data module gives it.
            out: what :meth:`forward` gave, one entry a view, of this process's own images.
            target_feats: the target network's features of the joint batch's large crops.
            batch_idx: number of the batch in its epoch.
        """

    def processes(self, joint: DistributedBatch) -> Processes:
        """Who shares the batch: ``joint``, unless this process is alone or the task gathers by itself."""
        alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
        alone = alone or torch.distributed.get_world_size() == 1 or not self.task.joint_batch
        return OneProcess() if alone else joint

    def joint_batch(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The joint batch of all processes, of each view; gradients flow to this process's part.

        Heads and losses are evaluated on it, so that negatives, cross-correlations and the heads' BatchNorm
        do not depend on how many processes a batch is spread over.
        """
        return list(joined(torch.stack(list(views)), self.processes(DistributedBatch(dim=1))))

    def multicrop_forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """solo-learn's path for small crops, with the same outputs as the large ones."""
        return self(X)

    def separate(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The augmented views, and the un-augmented one if the data come with it."""
        return (views, None) if self.original is None else (views[:-1], views[-1])

    def target_features(
        self, views: list[torch.Tensor], keep_statistics: bool = False
    ) -> list[torch.Tensor] | None:
        """The target network's features of the joint batch's large crops, (N, D) each; None without one.

        Args:
            views: images of each view, (N, 3, H, W) each, large crops first.
            keep_statistics: leave the running statistics of the target's BatchNorm as they are.
        """
        if self.task.target is None:
            return None
        trunk = self.task.target.trunk
        large = [self._layout(x) for x in views[: self.num_large_crops]]
        with torch.no_grad():
            feats = Functional(trunk).each({}, large) if keep_statistics else [trunk(x) for x in large]
            # in the images' precision, whatever autocast makes of it: the meta step has none
            return self.joint_batch([h.to(x.dtype) for h, x in zip(feats, large)])

    def _layout(self, images: torch.Tensor) -> torch.Tensor:
        return images if self.no_channel_last else images.to(memory_format=torch.channels_last)

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

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self._precision_before = _float32_precision()
        precision = OmegaConf.select(self.cfg, "performance.matmul_precision")
        if precision is not None:
            _set_float32_precision(precision, convolutions=precision != "highest")
        mode = OmegaConf.select(self.cfg, "performance.compile")
        if mode:
            self.compiled = CompiledForward(self.backbone, mode)

    def on_fit_end(self) -> None:
        super().on_fit_end()
        _set_float32_precision(*self._precision_before)  # a sweep's next run may want another
        if self.compiled is not None:
            self.compiled.remove()
            self.compiled = None

    def uncompiled(self) -> AbstractContextManager:
        """Within it, the encoder can be differentiated in forward mode, and twice."""
        return nullcontext() if self.compiled is None else self.compiled.paused()

    def on_train_start(self) -> None:
        super().on_train_start()
        self._last_step = self.trainer.global_step
        self.task.start_training(self.trainer)
        batch = self.cfg.optimizer.batch_size * self.trainer.world_size
        warning = self.task.own_negatives(self.trainer.num_training_batches * batch, self.num_crops)
        if warning is not None and self.trainer.is_global_zero:
            print(warning, flush=True)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.guard.read()  # max_steps may end a training inside an epoch

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.task.start_epoch()

    def on_after_backward(self) -> None:
        super().on_after_backward()
        self.task.after_backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.guard.before_step(self, optimizer)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the online classifier apart: in one norm, the labels would shorten the encoder's steps."""
        classifier = set(self.classifier.parameters())
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for its_own in (True, False):
            aside = {p: p.grad for p in parameters if (p in classifier) != its_own}
            for p in aside:
                p.grad = None
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
            for p, gradient in aside.items():
                p.grad = gradient

    def on_train_epoch_end(self) -> None:
        """Warns of a collapse: an encoder that gives all images the same features."""
        super().on_train_epoch_end()
        spread = self.trainer.callback_metrics.get("feature_std")
        below = {**NUMERICS, **(OmegaConf.select(self.cfg, "numerics") or {})}["collapse_below"]
        if below is not None and spread is not None and spread < below and self.trainer.is_global_zero:
            print(
                f"warning: the features have collapsed in epoch {self.trainer.current_epoch + 1}: their "
                f"standard deviation is {float(spread):.2g} of what it can be (numerics.collapse_below="
                f"{below}); lower optimizer.lr, or look at the loss and its augmentations",
                flush=True,
            )

    def on_train_batch_end(self, outputs: Any, batch: list, batch_idx: int) -> None:
        """What comes once an iteration, in the order of the class's docstring."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        step, stepped = self.trainer.global_step, self.trainer.global_step > self._last_step
        self._last_step = step
        # gradient accumulation may skip the optimiser's step, and so may what overflowed or is no number
        passed_over = stepped and self.guard.passed_over
        self.meta_stage(batch, stepped and not passed_over)
        if self.trainer.is_last_batch:
            self.guard.read()
        if passed_over:
            return
        logged = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": self._samples}
        self.log_dict(self.batch_metrics, **logged)
        self.task.after_batch(*self._branches)
        if stepped:
            self.task.after_step(self.backbone, self.position.progress(self.trainer))

    def meta_stage(self, batch: list, stepped: bool) -> None:
        """What a bi-level method does between the optimiser's step and the task's updates.

        Args:
            batch: as the data module gives it.
            stepped: whether the optimiser has stepped on it.
        """

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.guard.read()
        checkpoint["numbers"] = self.guard.state_dict()
        self.position.save(self.trainer, checkpoint)
        checkpoint["method_kwargs"] = OmegaConf.to_container(self.cfg.method_kwargs, resolve=True)
        for schedule in checkpoint.get("lr_schedulers", []):
            # solo-learn's way to a constant rate is a function in the schedule: it would be pickled, and is
            # there again anyway when the run goes on
            schedule.pop("get_lr", None)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuses another experiment's: solo-learn's auto-resume does not compare ``method_kwargs``."""
        super().on_load_checkpoint(checkpoint)
        if "numbers" in checkpoint:
            self.guard.load_state_dict(checkpoint["numbers"])
        if self._trainer is not None:  # else nothing is to be trained
            by_step = self.cfg.scheduler.name == "warmup_step" or self.cfg.scheduler.interval == "step"
            by_step = by_step and self.cfg.scheduler.name.startswith("warmup")
            self.position.load(self.trainer, checkpoint, by_step)
        mine = OmegaConf.to_container(self.cfg.method_kwargs, resolve=True)
        found = checkpoint.get("method_kwargs")
        if found is not None:  # of an earlier version
            found = with_new_names({"method_kwargs": copy.deepcopy(found)}, quiet=True)["method_kwargs"]
        by_itself = "resume_from_checkpoint" in self.cfg and self.cfg.resume_from_checkpoint is None
        if found is not None and by_itself:
            different = sorted(key for key in {*mine, *found} if mine.get(key) != found.get(key))
            check(
                not different,
                "the checkpoint to resume from",
                f"of this run, with its method_kwargs.{', '.join(different)}",
                {key: found.get(key) for key in different},
                "set auto_resume.enabled=False, or another checkpoint.dir",
            )


def _float32_precision() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _set_float32_precision(products: str, convolutions: bool) -> None:
    """Of matrix products, by torch's name; whether convolutions, which have their own switch, use TF32."""
    torch.set_float32_matmul_precision(products)
    torch.backends.cudnn.allow_tf32 = convolutions


def _detached(projections: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [z.detach() for z in projections]


def original_pipeline(cfg: DictConfig) -> DictConfig | None:
    """The pipeline of the un-augmented view, the last of ``augmentations``; None if that is another one."""
    pipelines = OmegaConf.select(cfg, "augmentations", default=None) or []
    if len(pipelines) < 2:
        return None
    *others, last = pipelines
    own_size = all(other.crop_size != last.crop_size for other in others)
    return last if own_size and not _is_random(last) and last.get("num_crops", 1) == 1 else None


def _is_random(pipeline: DictConfig) -> bool:
    rrc = pipeline.get("rrc") or {}
    # solo-learn's way to make images that are not square into a batch: a "random" crop of the whole
    cropped = rrc.get("enabled", False) and not rrc.get("crop_min_scale") == rrc.get("crop_max_scale") == 1
    return cropped or any(node.get("prob", 0) > 0 for node in pipeline.values() if OmegaConf.is_dict(node))
