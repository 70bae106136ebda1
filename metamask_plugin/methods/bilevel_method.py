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
from metamask_plugin.errors import UserError, check
from metamask_plugin.methods.meta_update import MetaUpdate
from metamask_plugin.methods.recorded import recorded
from metamask_plugin.methods.task_method import TaskMethod


class BilevelMethod(TaskMethod):
    """A method whose regular step Lightning optimises, and a meta step on other parameters.

    The regular step is ``training_step``'s loss under automatic optimisation, so that precision,
    clipping, accumulation and schedules work as everywhere. ``meta.schedule`` says where the meta step is:

    - ``iteration``: right after the optimiser's, on the same batch: MetaMask's Algorithm 1;
    - ``shared``: right before the regular step of the same batch, with which it shares the forward pass
      through the encoder: still a meta step and a regular step in turn;
    - ``epoch``: for all batches after the epoch's last: ICL-MSR's Algorithm 1.

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
    ) -> None:
        """One meta step on one batch.

        Args:
            batch: as the data module gives it, or a part of it.
            target_feats: the target network's features of the joint batch's large crops, where the regular
                step has them already.
            encoded: the regular step's pass through the encoder, for ``meta.schedule: shared``.
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
        self.meta.start(self.meta_parameters(), self.optimizers(use_pl_optimizer=False))
        self._rates: list[float] | None = None
        self._graph: CudaGraph | None = None
        self._captures = self._can_capture()

    def check_processes(self, processes: int) -> None:
        """Raises a UserError for what several processes cannot do together."""
        self.task.check_meta_step(processes)
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
    ) -> BilevelProblem:
        """One batch's bi-level problem.

        Args:
            views: augmented images of each view, (N, 3, H, W) each.
            more: what else the method needs.
            target_feats: see :meth:`meta_step`; computed here if None.
            encoded: see :meth:`meta_step`.
        """

    def meta_gradient(
        self,
        trial: Trial,
        views: list[torch.Tensor],
        *more: torch.Tensor,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
    ) -> MetaGradient:
        """The meta-gradient of one batch; the arguments are :meth:`meta_problem`'s.

        With ``performance.cuda_graph`` it is a replayed CUDA graph, unless a pass is shared with the regular
        step, which goes on with it.
        """
        if encoded is not None or not self._captures:
            problem = self.meta_problem(views, *more, target_feats=target_feats, encoded=encoded)
            return self.meta.gradient(problem, trial)
        lengths = [torch.full((), step.lr, device=views[0].device) for step in trial]
        if self._graph is None:
            self._graph = CudaGraph(partial(self._meta_gradient, trial))
        try:
            return self._graph(lengths, views, more, target_feats)
        except CaptureError as error:
            raise UserError(
                f"performance.cuda_graph must be False where the meta step cannot be captured: {error}"
            ) from error

    def _meta_gradient(self, trial: Trial, lengths, views, more, target_feats) -> MetaGradient:
        """The same as a function of all tensors that change their place from step to step."""
        trial = Trial(*(step.of_length(length) for step, length in zip(trial, lengths)))
        with self.uncompiled():  # compiled code may replay graphs of its own
            return self.meta.gradient(self.meta_problem(views, *more, target_feats=target_feats), trial)

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
        """The meta step of ``meta.schedule: shared``."""
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
            elif self.meta.per_iteration and stepped and self.meta.due(self.trainer.global_step):
                self._own_meta_step(batch)
        if self.trainer.is_last_batch:  # as the epoch leaves it, not its mean over the epoch
            self.log_dict(self.meta_state(), on_step=False, on_epoch=True)

    def apply_meta_gradient(self, main: torch.optim.Optimizer, outer_loss: torch.Tensor) -> bool:
        """The meta optimiser's step on the ``.grad`` of the meta parameters, unless something is not finite.

        Args:
            main: the main optimiser.
            outer_loss: L_out, a scalar.

        Returns:
            Whether it was made.
        """
        finite = self.guard.before_meta_step(self, outer_loss, self.meta_parameters())
        if finite:
            self.meta.step(main)
        return finite

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
        for number, batch in enumerate(batches):
            if self.meta.due(number + 1):
                batch = self.trainer.precision_plugin.convert_input(batch)  # as the trainer's own loop does
                indexes, views, labels = self.trainer.strategy.batch_to_device(batch)
                self.task.observe(indexes, labels, number)
                self._own_meta_step([indexes, views, labels])

    def _own_meta_step(self, batch: list) -> None:
        """A meta step that makes all its passes itself."""
        batch, target_feats = self._meta_batch(batch)
        if self.meta.cfg.update_statistics:
            self._update_statistics(batch[1], target_feats)
        with self._rates_of_the_regular_step():
            self.meta_step(batch, target_feats)

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

    def encoder_problem(
        self, encoder: Functional, views: list[torch.Tensor], encoded: EncoderPass | None
    ) -> dict[str, Any]:
        """What of a :class:`~metamask_plugin.bilevel.BilevelProblem` concerns the encoder.

        Args:
            encoder: the encoder as a function.
            views: images of each view, (N, 3, H, W) each; BatchNorm sees them one by one, as in the
                regular step.
            encoded: a pass that has been made already, if any.
        """

        def encode(theta):
            with self.uncompiled():
                return torch.stack(encoder.each(theta, views))

        def encode_once(theta):
            with nullcontext() if self.meta is None else self.meta.autocast(views[0].device.type):
                return torch.stack(encoder.each(theta, views))

        return {
            "encode": encode,
            "encode_once": encode_once,
            "eager": self.uncompiled,
            "encoder_params": encoder.params,
            "encoded": encoded,
            "processes": self.processes(DistributedBatch(dim=1)),
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.meta is not None:
            checkpoint["meta_optimizer"] = self.meta.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.meta is not None:
            self.meta.load_state_dict(checkpoint.get("meta_optimizer"))
