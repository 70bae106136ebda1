"""What both methods share: when the meta step happens, and what of it a checkpoint keeps."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from metamask_plugin.bilevel import (
    BilevelProblem,
    CaptureError,
    CudaGraph,
    DistributedBatch,
    EncoderPass,
    Functional,
    MetaGradient,
    Tape,
    Trial,
    Unrolled,
)
from metamask_plugin.bilevel.trial import Number
from metamask_plugin.errors import UserError, check
from metamask_plugin.methods.meta_remarks import OVERSHOOT, missing_meta_steps, overshoot
from metamask_plugin.methods.meta_update import MetaUpdate
from metamask_plugin.methods.recorded import recorded
from metamask_plugin.methods.task_method import TaskMethod
from metamask_plugin.modules.feature_queue import FeatureQueue
from metamask_plugin.tasks import Task

OuterBatch = tuple[list[torch.Tensor], list[torch.Tensor] | None]
"""Views, (N, 3, H, W) each, and the target network's features of them, (N, D) each, where they are known."""


class BilevelMethod(TaskMethod):
    """A method whose regular step Lightning optimises, and a meta step on other parameters.

    The regular step is ``training_step``'s loss under automatic optimisation, so that precision,
    clipping, accumulation and schedules work as everywhere. ``meta.when`` says where the meta step is:

    - ``after_step``: right after the optimiser's, on the same batch: MetaMask's Algorithm 1;
    - ``before_step``: right before the regular step of the same batch, with which it shares the forward pass
      through the encoder: still a meta step and a regular step in turn;
    - ``epoch_end``: for all batches after the epoch's last: ICL-MSR's Algorithm 1.

    Several processes solve one problem, that of their joint batch (:mod:`metamask_plugin.bilevel.processes`).

    Subclasses set :attr:`meta` and say what is meta-trained, how, and what to log of it.

    Attributes:
        meta: the meta step's state; None where there is none.
    """

    meta: MetaUpdate | None

    @abstractmethod
    def meta_parameters(self) -> Iterable[nn.Parameter]:
        """The parameters that the meta optimiser trains."""

    @abstractmethod
    def meta_step(
        self,
        batch: list,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> None:
        """One meta step on one batch.

        Args:
            batch: as the data module gives it, or a part of it.
            target_feats: the target network's features of the joint batch's large crops, where the regular
                step has them already.
            encoded: the regular step's pass through the encoder, for ``meta.when: before_step``.
            outer: what the outer loss is of, where that is another batch.
        """

    @abstractmethod
    def meta_state(self) -> dict[str, torch.Tensor]:
        """Scalars to log about the meta parameters, as an epoch leaves them."""

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.meta is None:
            return
        self.check_processes(self.trainer.world_size)
        self.meta.check(str(self.trainer.precision))
        main = self.optimizers(use_pl_optimizer=False)
        self.meta.start(self.meta_parameters(), main)
        by_value = self.trainer.gradient_clip_val and self.trainer.gradient_clip_algorithm == "value"
        check(
            not (by_value and self.meta.follows(main)),
            "gradient_clip_algorithm",
            "norm with a trial step that follows the optimiser",
            "value",
            "set gradient_clip_algorithm=norm, or ++method_kwargs.meta.inner_lr=1e-3",
        )
        self._rates: list[float] | None = None
        self._warned = self._fell = False
        self._graph: CudaGraph | None = None
        self._captures = self._can_capture()
        warning = missing_meta_steps(self.meta.cfg, self.trainer)
        if warning is not None and self.trainer.is_global_zero:
            print(warning, flush=True)

    def check_processes(self, processes: int) -> None:
        """Raises a UserError for what cannot be together: processes, the task, a second batch."""
        self.task.check_meta_step(processes)
        check(
            self.meta.cfg.outer_batch == "same" or type(self.task).observe is Task.observe,
            "method_kwargs.meta.outer_batch",
            f"same with the task {self.cfg.method_kwargs.task}, which is told of one batch at a time",
            self.meta.cfg.outer_batch,
        )
        remembers = any(isinstance(part, FeatureQueue) and len(part) > 0 for part in self.task.modules())
        check(
            self.meta.cfg.outer_batch == "same" or not remembers,
            "method_kwargs.meta.outer_batch",
            "same with a task that has a queue or bank: the batch of the trial step is in it by then",
            self.meta.cfg.outer_batch,
        )
        check(
            processes == 1 or not isinstance(self.meta.estimator, Unrolled),
            "method_kwargs.meta.estimator",
            "another than unrolled where several processes train",
            "unrolled",
            "exact is equal to it",
        )
        check(
            processes == 1 or not any(isinstance(module, nn.SyncBatchNorm) for module in self.modules()),
            "sync_batchnorm",
            "False with a meta step",
            True,
            "SyncBatchNorm has no second derivative; the heads see the joint batch without it",
        )

    @property
    def resumes_within_epoch(self) -> bool:
        """Not where the next meta step needs the batch before, which no checkpoint holds."""
        alone = self.meta is None or self.meta.cfg.outer_batch == "same"
        return alone and super().resumes_within_epoch

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._held: list | None = None

    def on_train_epoch_end(self) -> None:
        """Warns, once, of a trial step that does the opposite of what it is for."""
        super().on_train_epoch_end()
        self._held = None
        metrics = self.trainer.callback_metrics
        if "train_trial_gain" not in metrics or self._warned:
            return
        gain, loss = float(metrics["train_trial_gain"]), float(metrics["train_inner_loss"])
        # a little below 0 in a single epoch, as at the end of a warm-up, is nothing to act on
        self._warned = gain < -OVERSHOOT * abs(loss) or (gain < 0 and self._fell)
        self._fell = gain < 0
        if self._warned and self.trainer.is_global_zero:
            print(overshoot(self.meta.cfg, gain, self.trainer.current_epoch), flush=True)

    def on_fit_end(self) -> None:
        super().on_fit_end()
        self._graph = None  # with the memory that it holds

    @abstractmethod
    def meta_problem(
        self,
        views: list[torch.Tensor],
        *more: torch.Tensor,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> BilevelProblem:
        """One batch's bi-level problem.

        Args:
            views: augmented images of each view, (N, 3, H, W) each.
            more: what else the method needs.
            target_feats: see :meth:`meta_step`; computed here if None.
            encoded: see :meth:`meta_step`.
            outer: likewise.
        """

    def meta_gradient(
        self,
        trial: Trial,
        views: list[torch.Tensor],
        *more: torch.Tensor,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> MetaGradient:
        """The meta-gradient of one batch; the arguments are :meth:`meta_problem`'s.

        With ``performance.cuda_graph`` it is a replayed CUDA graph, unless a pass is shared with the regular
        step, which goes on with it.
        """
        scales = [step.scale for step in trial.steps]
        if self._graph is None and self._captures:
            self._graph, self._scales = CudaGraph(self._meta_gradient), scales
        # rates that change against each other, as of a predictor that keeps its own, are none of the numbers
        if encoded is not None or self._graph is None or scales != self._scales:
            problem = self.meta_problem(views, *more, target_feats=target_feats, encoded=encoded, outer=outer)
            return self.meta.gradient(problem, trial)
        device, self._trial = views[0].device, trial
        numbers = [[_on(device, number) for number in step.numbers] for step in trial.steps]
        try:
            return self._graph(numbers, views, more, target_feats, outer)
        except CaptureError as error:
            raise UserError(
                f"performance.cuda_graph must be False where the meta step cannot be captured: {error}"
            ) from error

    def _meta_gradient(self, numbers, views, more, target_feats, outer) -> MetaGradient:
        """The same as a function of all tensors that change their place from step to step."""
        steps = (step.with_numbers(*own) for step, own in zip(self._trial.steps, numbers))
        trial = Trial(*steps, self._trial.weight, self._trial.clip)
        with self.uncompiled():  # compiled code may replay graphs of its own
            problem = self.meta_problem(views, *more, target_feats=target_feats, outer=outer)
            return self.meta.gradient(problem, trial)

    def trial(self, encoder: nn.Module, head: nn.Module, weight: float = 1.0) -> Trial:
        """The trial steps of this iteration.

        Args:
            encoder: theta's module.
            head: phi's.
            weight: what the inner loss counts for in the regular loss.
        """
        main = self.optimizers(use_pl_optimizer=False)
        return self.meta.trial(main, encoder, head, weight, self.trainer.gradient_clip_val or None)

    def _can_capture(self) -> bool:
        """Whether meta steps are to be replayed as a CUDA graph, and can be."""
        asked = OmegaConf.select(self.cfg, "performance.cuda_graph", default=False)
        alone = self.trainer.world_size == 1
        return bool(asked) and self.device.type == "cuda" and alone and self.task.capturable

    def host_step(self, batch: list, batch_idx: int) -> dict[str, Any]:
        """Records the encoder where the meta step is to share the pass.

        That pass is not compiled: torch.compile gets a second differentiation wrong.
        """
        self._tape = None
        if not self._due_before(batch_idx):
            return super().host_step(batch, batch_idx)
        self._tape = Tape()
        with self.uncompiled(), recorded(self.backbone, self._tape):
            return super().host_step(batch, batch_idx)

    def before_regular_loss(
        self, batch: list, out: dict[str, Any], target_feats: list[torch.Tensor] | None, batch_idx: int
    ) -> None:
        """The meta step of ``meta.when: before_step``."""
        if self._due_before(batch_idx):
            params = {name: p for name, p in self.backbone.named_parameters() if p.requires_grad}
            encoded = EncoderPass(torch.stack(list(out["feats"])), params, self._tape, shared=True)
            with torch.autocast(self.device.type, enabled=False):  # of the regular step, around this hook
                self.meta_step(batch, target_feats, encoded)
            self._tape = None  # what backward needs the graph has; the rest is free again

    def _due_before(self, batch_idx: int) -> bool:
        """Whether a meta step is due on this batch that comes before its regular step."""
        if self.meta is None or not self.meta.shared:
            return False
        accumulated = self.trainer.accumulate_grad_batches
        last = batch_idx + 1 == self.trainer.num_training_batches
        steps = (batch_idx + 1) % accumulated == 0 or last
        return steps and self.meta.due(self.trainer.global_step + 1)

    def meta_stage(self, batch: list, stepped: bool) -> None:
        """The meta step, once the optimiser has stepped (gradient accumulation may skip it)."""
        if self.meta is not None:
            if self.meta.per_epoch and self.trainer.is_last_batch:
                self._meta_epoch()
            elif self.meta.per_iteration and stepped:
                self._meta_step_on(batch, self.meta.due(self.trainer.global_step))
        if self.trainer.is_last_batch:  # as the epoch leaves it, not its mean over the epoch
            self.log_dict(self.meta_state(), on_step=False, on_epoch=True)

    def apply_meta_gradient(
        self, main: torch.optim.Optimizer, found: MetaGradient, metrics: dict[str, torch.Tensor], images: int
    ) -> bool:
        """The meta optimiser's step on the ``.grad`` of the meta parameters, unless something is not finite.

        Args:
            main: the main optimiser.
            found: the meta-gradient that ``.grad`` is from.
            metrics: what the method logs beside the diagnostics of the trial step.
            images: N, of this process.

        Returns:
            Whether it was made.
        """
        if not self.guard.before_meta_step(self, found.outer_loss, self.meta_parameters()):
            return False
        metrics = {
            "train_inner_loss": found.inner_loss,
            "train_outer_loss": found.outer_loss,
            "train_trial_gain": found.gain,
            "train_trial_length": found.relative_length,
            **self.meta.statistics(self.meta_parameters()),
            **metrics,
        }
        self.meta.step(main)
        self.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=images)
        return True

    def _meta_batch(self, batch: list) -> tuple[list, list[torch.Tensor] | None]:
        """The part of a batch that ``meta.batch_share`` asks for; its target features if they are there."""
        share = self.meta.cfg.batch_share
        if share == 1:
            return batch, self._target_feats
        indexes, views, labels = batch
        count = max(2, math.ceil(share * len(indexes)))
        return [indexes[:count], [view[:count] for view in views], labels[:count]], None

    def _meta_epoch(self) -> None:
        """Algorithm 1's second loop: the epoch's images once more, in the same order."""
        self._target_feats = None  # of another batch
        batches = islice(self.trainer.train_dataloader, self.trainer.num_training_batches)
        self._held = None
        for number, batch in enumerate(batches):
            due = self.meta.due(number + 1)
            if due or self.meta.cfg.outer_batch == "next":
                batch = self.trainer.precision_plugin.convert_input(batch)  # as the trainer's own loop does
                indexes, views, labels = self.trainer.strategy.batch_to_device(batch)
                self.task.observe(indexes, labels, number)
                self._meta_step_on([indexes, views, labels], due)

    def _meta_step_on(self, batch: list, due: bool) -> None:
        """A meta step that makes all its passes itself, if one is due.

        With ``meta.outer_batch: next`` its trial step is of the batch before, of which an epoch's first batch
        has none.
        """
        batch, target_feats = self._meta_batch(batch)
        if self.meta.cfg.outer_batch == "same":
            inner, outer = (batch, target_feats), None
        else:
            inner, outer = (self._held, None), (self.separate(batch[1])[0], target_feats)
            self._held = batch
        if not due or inner[0] is None:
            return
        if self.meta.cfg.update_statistics:
            self._update_statistics(inner[0][1], inner[1])
        with self._rates_of_the_regular_step():
            self.meta_step(*inner, outer=outer)

    @torch.no_grad()
    def _update_statistics(self, views: list[torch.Tensor], target_feats: list[torch.Tensor] | None) -> None:
        """Moves the running statistics of encoder and heads by one pass at the new weights, M still the old.

        In MetaMask's release [0] the meta step's first forward is one of the network itself. Here the meta
        step's passes leave no trace, so this is one more, outside what a CUDA graph replays.

        [0] https://github.com/lionellee9089/MetaMask
        """
        views, original = self.separate(views)
        if target_feats is None:
            target_feats = self.target_features(views, keep_statistics=True)
        with self.uncompiled():
            passes = [self(x) for x in views]
        keys = [key for key in ("feats", "maps") if key in passes[0]]
        out = {key: self.joint_batch([one[key] for one in passes]) for key in keys}
        self.regular_loss(out, target_feats, original)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        super().on_before_optimizer_step(optimizer)
        self._rates = [group["lr"] for group in optimizer.param_groups]

    @contextmanager
    def _rates_of_the_regular_step(self) -> Iterator[None]:
        """Within it, the main optimiser has the learning rates of its last step.

        Lightning moves a schedule before the meta step: at a drop the trial step would be another than the
        regular step, and at the end of a cosine, where the rate is 0, there would be none.
        """
        if self._rates is None:
            yield
            return
        groups = self.optimizers(use_pl_optimizer=False).param_groups
        moved = [group["lr"] for group in groups]
        for group, rate in zip(groups, self._rates):
            group["lr"] = rate
        try:
            yield
        finally:
            for group, rate in zip(groups, moved):
                group["lr"] = rate

    def laid_out(
        self, views: list[torch.Tensor], outer: OuterBatch | None
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None, list[torch.Tensor] | None]:
        """Views of the inner batch, views and targets of the outer one, in the encoder's memory format."""
        outer_views, targets = outer or (None, None)
        laid = [self._layout(x) for x in views]
        return laid, None if outer is None else [self._layout(x) for x in outer_views], targets

    def encoder_problem(
        self,
        encoder: Functional,
        views: list[torch.Tensor],
        encoded: EncoderPass | None,
        outer_views: list[torch.Tensor] | None = None,
    ) -> dict[str, Any]:
        """What of a :class:`~metamask_plugin.bilevel.BilevelProblem` concerns the encoder.

        Args:
            encoder: the encoder as a function.
            views: images of each view, (N, 3, H, W) each; BatchNorm sees them one by one, as in the
                regular step.
            encoded: a pass that has been made already, if any.
            outer_views: those of the outer loss, where it is of another batch.
        """

        def encode(theta):
            with self.uncompiled():
                return torch.stack(encoder.each(theta, views))

        def encode_once(theta, images=views):
            with nullcontext() if self.meta is None else self.meta.autocast(images[0].device.type):
                return torch.stack(encoder.each(theta, images))

        return {
            "encode": encode,
            "encode_once": encode_once,
            "outer_encode": None if outer_views is None else partial(encode_once, images=outer_views),
            "eager": self.uncompiled,
            "encoder_params": encoder.params,
            "encoded": encoded,
            "processes": self.processes(DistributedBatch(dim=1)),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.meta is not None:
            checkpoint |= self.meta.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.meta is not None:
            self.meta.load_state_dict(checkpoint)


def _on(device: torch.device, number: Number) -> torch.Tensor:
    """A number as a tensor on a device, without waiting for it."""
    return number if isinstance(number, torch.Tensor) else torch.full((), number, device=device)
