"""What every method of this package shares: one iteration, on a task and the host's encoder."""

import copy
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin import host
from metamask_plugin.bilevel import (
    BilevelProblem,
    EncoderPass,
    Functional,
    Ranks,
    current_ranks,
    global_batch,
)
from metamask_plugin.errors import check, choose
from metamask_plugin.host import BaseMethod
from metamask_plugin.host.optimizers import build_warmup_step
from metamask_plugin.host.solo_settings import is_solo_task, own_settings
from metamask_plugin.host.solo_task import HostTask, SoloTask
from metamask_plugin.methods.meta_step import MetaStep, MetaVariables, OuterBatch
from metamask_plugin.methods.numeric_guard import DEFAULTS as NUMERICS
from metamask_plugin.methods.numeric_guard import NumericGuard
from metamask_plugin.methods.python import config_of
from metamask_plugin.methods.schedule_position import SchedulePosition
from metamask_plugin.methods.step import RegularLoss, Step
from metamask_plugin.modules.compiled import MODES, CompiledForward
from metamask_plugin.modules.encoders import feature_std
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.renamed import with_new_names
from metamask_plugin.tasks import Task, build_task

MATMUL_PRECISIONS = ("highest", "high", "medium")


class TaskMethod(BaseMethod):
    """A method whose regular loss is made of a task's projections.

    One iteration, Algorithm 1 of MetaMask and of ICL-MSR: the regular loss of a batch
    (:meth:`training_step`); the optimiser's step; the meta step, which sees queues and target network as the
    regular loss did; then, once, the task's ``after_batch`` and ``after_step`` (:meth:`on_train_batch_end`).

    A last view that is un-augmented (see :func:`original_pipeline`) is ICL-MSR's; the task never sees it,
    so that a task alone and with a plugin trains on the same views of the same config.

    Args:
        cfg: the host's configuration; ``method_kwargs`` has ``task`` and ``task_kwargs``. Or an encoder.
        settings: of :func:`~metamask_plugin.methods.python.config_of`, where an encoder is given.

    Attributes:
        task: heads and loss.
        hooks: the task, where it wants to be told of more than a :class:`Task` is; else None.
        meta: the meta step; None where there is none.
        ranks: who shares a batch, from the start of training on; None where this process is alone.
        step: the iteration at hand.
    """

    meta: MetaStep | None = None
    ranks: Ranks | None = None
    step: Step

    def __init__(self, cfg: DictConfig | nn.Module, **settings: Any):
        if isinstance(cfg, nn.Module):
            name = next((name for name, cls in host.METHODS.items() if cls is type(self)), "custom")
            cfg = config_of(name, cfg, **settings)
        super().__init__(cfg)
        self.original = original_pipeline(self.cfg)
        if self.original is not None:  # the host does not count it among the views
            self.num_small_crops -= 1
            self.num_crops -= 1
            self.multicrop = self.num_small_crops > 0
        self.memory_format = torch.preserve_format if self.no_channel_last else torch.channels_last
        self.task = self._build_task()
        self.task.init_target(self.backbone)
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
    def hooks(self) -> HostTask | None:
        return self.task if isinstance(self.task, HostTask) else None

    @property
    def resumes_within_epoch(self) -> bool:
        """Whether a checkpoint from the middle of an epoch holds all that the rest of it depends on."""
        return (self.hooks is None or self.hooks.resumes_within_epoch) and (
            self.meta is None or self.meta.resumes_within_epoch
        )

    @property
    def learnable_params(self) -> list[dict[str, Any]]:
        """Adds the task's heads; a target network follows them and is not trained."""
        groups = None if self.hooks is None else self.hooks.parameter_groups()
        if groups is None:
            groups = [{"name": "task", "params": [p for p in self.task.parameters() if p.requires_grad]}]
        return [*super().learnable_params, *groups]

    def forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """The host's outputs, and in evaluation the task's projection ``z``.

        In training the loss makes its own projections, so that the heads' BatchNorm sees them once.
        """
        feats = self.backbone(X.to(memory_format=self.memory_format))
        out = {"logits": self.classifier(feats.detach()), "feats": feats}
        if not self.training:
            out["z"] = self.task.project(self.masked(feats))
        return out

    def multicrop_forward(self, X: torch.Tensor) -> dict[str, torch.Tensor]:
        """solo-learn's path for small crops, with the same outputs as the large ones."""
        return self(X)

    def masked(self, feats: torch.Tensor) -> torch.Tensor:
        """What the task's head sees of features, (N, D) to the same."""
        return feats

    # What a method says of itself.

    @abstractmethod
    def regular_loss(
        self,
        out: dict[str, list[torch.Tensor]],
        target_feats: list[torch.Tensor] | None,
        original: torch.Tensor | None = None,
    ) -> RegularLoss:
        """The loss that the main optimiser descends, for one batch.

        Args:
            out: what :meth:`forward` gave, one entry a view, large crops first: ``feats`` (N, D), of the
                global batch.
            target_feats: the target network's features of the large crops, (N, D) each, of the global batch;
                None without one.
            original: un-augmented images (N, 3, H, W), where the data come with them; of this rank.
        """

    def meta_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the meta optimiser trains."""
        return ()

    def meta_variables(self, original: torch.Tensor | None) -> MetaVariables:
        """The outer variable w of one batch and what its gradient enters; asked where there is a meta step.

        Args:
            original: as for :meth:`regular_loss`.
        """
        raise NotImplementedError

    def meta_problem(
        self,
        views: list[torch.Tensor],
        outer_param: torch.Tensor,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> BilevelProblem:
        """One batch's bi-level problem; asked where there is a meta step.

        Args:
            views: augmented images of each view, (N, 3, H, W) each, in the encoder's memory format.
            outer_param: w.
            target_feats: the target network's features of the global batch's large crops, where they are
                known; computed here if None.
            encoded: the regular step's pass through the encoder, where it is shared.
            outer: what the outer loss is of, where that is another batch.
        """
        raise NotImplementedError

    def meta_state(self) -> dict[str, torch.Tensor]:
        """Scalars to log about the meta parameters, as an epoch leaves them."""
        return {}

    # One iteration.

    def training_step(self, batch: list, batch_idx: int) -> torch.Tensor:
        """The regular loss, MetaMask's and ICL-MSR's Eq. (5), plus the online classifier's."""
        indexes, views, labels = batch
        views, original = self.separate(views)
        step = self.step = Step(self.global_step, indexes, views, original)
        if self.guard.skips:
            self.guard.keep_statistics(self)
        hooks = self.hooks
        if hooks is not None:
            hooks.before_batch(indexes, labels, batch_idx)

        # features of each view, and the online classifier
        shared = self.meta is not None and self.meta.shared and self.meta.due_before(self, batch_idx)
        with self.meta.recording(self) if shared else nullcontext():
            out = super().training_step([indexes, views, labels], batch_idx)
        step.target_feats = self.target_features(views)
        if shared:
            self.meta.before_regular_loss(self, out["feats"])

        # the regular loss, of the global batch; all ranks gather in one order
        if hooks is not None:
            hooks.before_regular_loss()
        classification = out["loss"]
        if self.ranks is not None:
            out = {key: self.global_batch(out[key]) for key in ("feats", "maps") if key in out}
        spread = feature_std(torch.cat(list(out["feats"][: self.num_large_crops])).detach())
        loss, parts, projections, targets = self.regular_loss(out, step.target_feats, original)
        step.projections = [z.detach() for z in projections]
        step.targets = None if targets is None else [z.detach() for z in targets]
        losses = {name: value.detach() for name, value in {**parts, "train_loss": loss}.items()}
        step.metrics = {**losses, "feature_std": spread}
        watched = {**losses, "train_class_loss": classification.detach()}
        self.guard.batches.append(({} if hooks is not None and hooks.loss_may_be_nan else watched, indexes))
        return loss + classification

    def on_after_backward(self) -> None:
        super().on_after_backward()
        if self.hooks is not None:
            self.hooks.after_backward()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self.step.rates = [group["lr"] for group in optimizer.param_groups]
        self.guard.before_step(self, optimizer, self.step.views)

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

    def on_train_batch_end(self, outputs: Any, batch: list, batch_idx: int) -> None:
        """What comes behind the optimiser's step: the meta step, then queues and target network."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        step = self.step
        # gradient accumulation may skip the optimiser's step, and so may what overflowed or is no number
        stepped = self.trainer.global_step > step.global_step
        passed_over = stepped and self.guard.passed_over
        self.meta_stage(step, stepped and not passed_over)
        step.views, step.original = [], None  # no images are held through a validation
        if self.trainer.is_last_batch:
            self.guard.read()
        if passed_over:
            return
        logged = {"on_step": False, "on_epoch": True, "sync_dist": True, "batch_size": len(step.indexes)}
        self.log_dict(step.metrics, **logged)
        self.task.after_batch(step.projections, step.targets)
        if stepped:
            done = self.trainer.global_step + self.position.offset
            self.task.after_step(self.backbone, min(1.0, done / self.trainer.estimated_stepping_batches))

    def meta_stage(self, step: Step, stepped: bool) -> None:
        """The meta step, between the optimiser's step and the task's updates.

        Args:
            step: the iteration at hand.
            stepped: whether the optimiser has stepped in it.
        """
        if self.meta is not None:
            self.meta.after_step(self, step, stepped)
        state = self.meta_state() if self.trainer.is_last_batch else {}
        if state:  # as the epoch leaves it, not its mean over the epoch
            self.log_dict(state, on_step=False, on_epoch=True)

    # What an iteration needs.

    def separate(self, views: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """The augmented views, and the un-augmented one if the data come with it."""
        return (views, None) if self.original is None else (views[:-1], views[-1])

    def global_batch(self, views: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The global batch of several ranks, of each view; gradients flow to this rank's part.

        Heads and losses are evaluated on it, so that negatives, cross-correlations and the heads' BatchNorm
        do not depend on how many ranks a batch is spread over.
        """
        return list(global_batch(torch.stack(list(views)), self.ranks))

    def target_features(
        self, views: list[torch.Tensor], keep_statistics: bool = False
    ) -> list[torch.Tensor] | None:
        """The target network's features of the global batch's large crops, (N, D) each; None without one.

        Args:
            views: images of each view, (N, 3, H, W) each, large crops first.
            keep_statistics: leave the running statistics of the target's BatchNorm as they are.
        """
        if self.task.target is None:
            return None
        trunk = self.task.target.trunk
        large = [x.to(memory_format=self.memory_format) for x in views[: self.num_large_crops]]
        with torch.no_grad():
            feats = Functional(trunk).each({}, large) if keep_statistics else [trunk(x) for x in large]
            # in the images' precision, whatever autocast makes of it: the meta step has none
            feats = [h.to(x.dtype) for h, x in zip(feats, large)]
            return feats if self.ranks is None else self.global_batch(feats)

    def uncompiled(self) -> AbstractContextManager:
        """Within it, the encoder can be differentiated in forward mode, and twice."""
        return nullcontext() if self.compiled is None else self.compiled.paused()

    # The training around it.

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
        if self.meta is not None:
            self.meta.on_fit_end()

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.hooks is not None:
            self.hooks.start_training(self.trainer)
        self.ranks = None if self.hooks is not None and self.hooks.gathers_itself else current_ranks(dim=1)
        images = self.trainer.num_training_batches * self.cfg.optimizer.batch_size * self.trainer.world_size
        warning = own_negatives(self.task, images, self.num_crops)
        if warning is not None and self.trainer.is_global_zero:
            print(warning, flush=True)
        if self.meta is not None:
            self.meta.on_train_start(self)

    def on_train_end(self) -> None:
        super().on_train_end()
        self.guard.read()  # max_steps may end a training inside an epoch

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.hooks is not None:
            self.hooks.start_epoch()
        if self.meta is not None:
            self.meta.on_epoch_start()

    def on_train_epoch_end(self) -> None:
        """Warns of a collapse, an encoder that gives all images the same features, and of an overshooting
        inner step."""
        super().on_train_epoch_end()
        if self.meta is not None:
            self.meta.on_epoch_end(self)
        spread = self.trainer.callback_metrics.get("feature_std")
        below = {**NUMERICS, **(OmegaConf.select(self.cfg, "numerics") or {})}["collapse_below"]
        if below is not None and spread is not None and spread < below and self.trainer.is_global_zero:
            print(
                f"warning: the features have collapsed in epoch {self.trainer.current_epoch + 1}: their "
                f"standard deviation is {float(spread):.2g} of what it can be (numerics.collapse_below="
                f"{below}); lower optimizer.lr, or look at the loss and its augmentations",
                flush=True,
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        self.guard.read()
        if self.meta is not None:
            checkpoint.update(self.meta.state_dict())
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
        if self.meta is not None:
            self.meta.load_state_dict(checkpoint)
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


def own_negatives(task: Task, images: int, views: int) -> str | None:
    """A warning where images meet their own past projections as negatives.

    Args:
        task: whose queues are asked.
        images: in an epoch, of all ranks.
        views: of each image.
    """
    for queue in task.modules():
        if isinstance(queue, FeatureQueue) and queue.negatives and len(queue) > images * views:
            return (
                f"warning: {queue.name}={len(queue)} holds projections of more than one epoch "
                f"({images} images, {views} views): images meet their own as negatives; take at most {images}"
            )
    return None


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
