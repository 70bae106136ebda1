"""The meta step: when it is due, its inner step, its meta-gradient, its optimiser."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.utils import get_total_norm
from torch.utils._pytree import tree_map_only

from metamask_plugin.bilevel import (
    ESTIMATORS,
    CaptureError,
    CudaGraph,
    EncoderPass,
    Estimator,
    HeadsOnly,
    InnerStep,
    MetaGradient,
    Tape,
)
from metamask_plugin.bilevel.inner_step import follows
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.host import BaseMethod
from metamask_plugin.host.optimizers import build_optimizer
from metamask_plugin.methods.meta_checks import (
    OVERSHOOT,
    check_inner_step,
    check_run,
    check_settings,
    missing_meta_steps,
    overshoot,
)
from metamask_plugin.methods.step import Step

OuterBatch = tuple[list[torch.Tensor], list[torch.Tensor] | None]
"""Views, (N, 3, H, W) each, and the target network's features of them, (N, D) each, where they are known."""

Batch = tuple[list[torch.Tensor], torch.Tensor | None, list[torch.Tensor] | None]
"""Views, un-augmented images, and the target network's features, where they are known."""


class MetaVariables(NamedTuple):
    """The outer variable of one batch, and what its gradient goes into.

    Attributes:
        outer_param: w, without a graph.
        accumulate: takes the meta-gradient to the ``.grad`` of the meta parameters; returns what to log.
        confine: brings the meta parameters back into their range after a step; None without a range.
    """

    outer_param: torch.Tensor
    accumulate: Callable[[MetaGradient], dict[str, torch.Tensor] | None]
    confine: Callable[[], None] | None = None


class MetaStep:
    """Owns everything of the meta step that outlives one iteration, and makes it when it is due.

    ``when`` says where the meta step is:

    - ``after_step``: right after the optimiser's, on the same batch: MetaMask's Algorithm 1;
    - ``before_step``: right before the regular step of the same batch, with which it shares the forward pass
      through the encoder: still a meta step and a regular step in turn;
    - ``epoch_end``: for all batches after the epoch's last: ICL-MSR's Algorithm 1.

    Several ranks solve one problem, that of their global batch (:mod:`metamask_plugin.bilevel.ranks`).

    Not a module: its only tensors are optimiser state, saved through :meth:`state_dict`. The meta parameters
    themselves belong to the method, which also says what the problem is: its ``meta_parameters``,
    ``meta_variables`` and ``meta_problem``.

    Args:
        cfg: ``method_kwargs.meta``: ``estimator``, ``estimator_kwargs``; ``trial``, the inner step, which the
            papers call the trial step: ``plain``, a gradient step as in the papers; ``adaptive``, scaled as
            the main optimiser scales its own; ``momentum``, as in MetaMask's release; ``auto``: adaptive for
            Adam, AdamW and LARS, unless a length is given, and plain otherwise; ``inner_lr``, its length,
            ``null`` for the main optimiser's current learning rate, ``auto`` for a plain step whose length
            follows the adaptive one's; ``outer_batch``: ``same``, or ``next``, the outer loss is then of the
            batch after the one of the inner step; ``accumulate``: how many meta-gradients one meta step is
            the mean of; ``trial_on``: ``all``, or ``heads``, the encoder then takes no inner step; ``when``;
            ``every_n_steps``: of these only every n-th; ``batch_share``, of each batch, in (0, 1];
            ``precision``, of the encoder's arithmetic: ``full``, the parameters' own, or ``bf16`` (heads and
            losses always have the parameters' own); ``optimizer`` (name, lr, weight_decay, kwargs);
            ``decay_lr``, whether the meta learning rate decays with the main one; ``update_statistics``,
            whether the meta step moves BatchNorm's running statistics, too, as in MetaMask's release: by a
            forward pass at the new weights.
        encoder: theta's module.
        head: phi's.
        weight: factor of the inner loss in the regular loss.

    Attributes:
        estimator: of the meta-gradient.
        dtype: that autocast lowers the encoder's passes to; None for none.
        shared: whether it precedes a regular step and shares its forward pass.
        optimizer: of the meta parameters, from :meth:`start` on.

    Raises:
        UserError: for settings that cannot be.
    """

    def __init__(self, cfg: DictConfig, encoder: nn.Module, head: nn.Module, weight: float = 1.0):
        check_settings(cfg)
        self.cfg, self.encoder, self.head, self.weight = cfg, encoder, head, weight
        self.shared: bool = cfg.when == "before_step"
        self.dtype = torch.bfloat16 if cfg.precision == "bf16" else None
        self.estimator = build_estimator(cfg.estimator, OmegaConf.to_container(cfg.estimator_kwargs))
        if cfg.trial_on == "heads":
            self.estimator = HeadsOnly(self.estimator)
        self.optimizer: torch.optim.Optimizer | None = None
        self._state: dict[str, Any] | None = None
        self._previous: list[torch.Tensor] | None = None
        self._gathered: list[list[torch.Tensor]] = []
        self._tape: Tape | None = None
        self._held: Batch | None = None
        self._captures = self._warned = self._fell = False
        self._graph: CudaGraph | None = None

    # One meta step.

    def run(
        self,
        method: BaseMethod,
        views: list[torch.Tensor],
        original: torch.Tensor | None,
        target_feats: list[torch.Tensor] | None = None,
        encoded: EncoderPass | None = None,
        outer: OuterBatch | None = None,
    ) -> None:
        """Eqs. (6) and (7) of MetaMask, (7) and (8) of ICL-MSR, on one batch.

        Args:
            method: whose meta parameters go down the meta-gradient.
            views: augmented images of each view, (N, 3, H, W) each.
            original: un-augmented images, where the data come with them.
            target_feats: the target network's features of the global batch's large crops, where the regular
                step has them already.
            encoded: the regular step's pass through the encoder, for ``before_step``.
            outer: what the outer loss is of, where that is another batch.
        """
        main = method.optimizers(use_pl_optimizer=False)
        views = [x.to(memory_format=method.memory_format) for x in views]
        if outer is not None:
            outer = [x.to(memory_format=method.memory_format) for x in outer[0]], outer[1]
        step = self.inner_step(main, method.trainer.gradient_clip_val or None)
        variables = method.meta_variables(original)
        w = variables.outer_param
        with torch.autocast(w.device.type, enabled=False):
            if self._captures and encoded is None:
                found = self._replayed(method, step, views, w, target_feats, outer)
            else:
                problem = method.meta_problem(views, w, target_feats, encoded, outer)
                found = self.estimator.gradient(problem, step)
        more = variables.accumulate(found) or {}
        parameters = self.optimizer.param_groups[0]["params"]
        if not method.guard.before_meta_step(method, found.outer_loss, parameters):
            return
        metrics = {
            "train_inner_loss": found.inner_loss,
            "train_outer_loss": found.outer_loss,
            "train_trial_gain": found.gain,
            "train_trial_length": found.relative_length,
            **self.statistics(),
            **more,
        }
        self.step(main)
        if variables.confine is not None:
            variables.confine()
        method.log_dict(metrics, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(views[0]))

    def inner_step(self, main: torch.optim.Optimizer, clip: float | None = None) -> InnerStep:
        """The inner step from the main optimiser's current state.

        Args:
            main: the main optimiser.
            clip: norm to which the trainer clips gradients; None for none.
        """
        rule, lr = self.cfg.trial, self.cfg.inner_lr
        return InnerStep.following(main, self.encoder, self.head, rule, lr, self.weight, clip)

    def statistics(self) -> dict[str, torch.Tensor]:
        """What one meta-gradient, the parameters' ``.grad``, looks like; scalars to log.

        ``meta_gradient_norm``, and from the second on ``meta_gradient_cosine`` with the one before: near 1
        where all batches ask for the same, near 0 where it is noise of the batch.
        """
        gradients = [parameter.grad.detach() for parameter in self.optimizer.param_groups[0]["params"]]
        norm = get_total_norm(gradients)
        found = {"meta_gradient_norm": norm}
        if self._previous is not None:
            product = sum((a * b).sum() for a, b in zip(gradients, self._previous))
            lengths = norm * get_total_norm(self._previous)
            found["meta_gradient_cosine"] = product / lengths.clamp(min=torch.finfo(norm.dtype).tiny)
        self._previous = [gradient.clone() for gradient in gradients]
        return found

    def step(self, main: torch.optim.Optimizer) -> None:
        """Steps the meta optimiser on the ``.grad`` of its parameters, then clears it.

        With ``accumulate: m`` on the mean of m of them, once they are there.

        Args:
            main: whose learning rate ``decay_lr`` follows.
        """
        if self.cfg.decay_lr:
            group = main.param_groups[0]
            decay = group["lr"] / group.get("initial_lr", group["lr"])
            for meta_group in self.optimizer.param_groups:
                meta_group["lr"] = self.cfg.optimizer.lr * decay
        ready = True
        if self.cfg.accumulate > 1:
            parameters = self.optimizer.param_groups[0]["params"]
            self._gathered.append([parameter.grad.detach().clone() for parameter in parameters])
            ready = len(self._gathered) >= self.cfg.accumulate
            if ready:
                for parameter, gradients in zip(parameters, zip(*self._gathered)):
                    parameter.grad = torch.stack(gradients).mean(dim=0)
                self._gathered = []
        if ready:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def _replayed(
        self,
        method: BaseMethod,
        step: InnerStep,
        views: list[torch.Tensor],
        w: torch.Tensor,
        target_feats: list[torch.Tensor] | None,
        outer: OuterBatch | None,
    ) -> MetaGradient:
        """The meta-gradient as a replayed CUDA graph: a function of all tensors that change their place."""

        def gradient(numbers, views, w, target_feats, outer):
            rules = (rule.with_numbers(*own) for rule, own in zip(self._inner_step[:2], numbers))
            with method.uncompiled():  # compiled code may replay graphs of its own
                problem = method.meta_problem(views, w, target_feats, None, outer)
                return self.estimator.gradient(problem, InnerStep(*rules, *self._inner_step[2:]))

        self._inner_step, scales = step, [rule.scale for rule in step[:2]]
        if self._graph is None:
            self._graph, self._scales = CudaGraph(gradient), scales
        # rates that change against each other, as of a predictor that keeps its own, are none of the numbers
        if scales != self._scales:
            return self.estimator.gradient(method.meta_problem(views, w, target_feats, None, outer), step)
        numbers = [
            [
                x if isinstance(x, torch.Tensor) else torch.full((), x, device=w.device)  # does not wait
                for x in rule.numbers
            ]
            for rule in step[:2]
        ]
        try:
            return self._graph(numbers, views, w, target_feats, outer)
        except CaptureError as error:
            raise UserError(
                f"performance.cuda_graph must be False where the meta step cannot be captured: {error}"
            ) from error

    # When it is due.

    def due(self, step: int) -> bool:
        """Whether the ``step``-th meta step, counted from 1, is to be made."""
        return step % self.cfg.every_n_steps == 0

    def due_before(self, method: BaseMethod, batch_idx: int) -> bool:
        """Whether a meta step is due on this batch that comes before its regular step."""
        accumulated, last = method.trainer.accumulate_grad_batches, method.trainer.num_training_batches
        steps = (batch_idx + 1) % accumulated == 0 or batch_idx + 1 == last
        return steps and self.due(method.trainer.global_step + 1)

    @contextmanager
    def recording(self, method: BaseMethod) -> Iterator[None]:
        """Within it the encoder's calls are recorded, and nothing else is: the meta step shares the pass.

        That pass is not compiled: torch.compile gets a second differentiation wrong.

        Raises:
            UserError: if the encoder draws random numbers: the pass could not be repeated in forward mode.
        """
        self._tape, recordings = Tape(), []

        def start(module, args):
            recordings.append((_random_state(args[0]), self._tape.recording()))
            recordings[-1][1].__enter__()

        def stop(module, args, output):
            state, recording = recordings.pop()
            recording.__exit__(None, None, None)
            check(
                output is None or torch.equal(state, _random_state(args[0])),
                "method_kwargs.meta.when",
                "after_step or epoch_end with an encoder that draws random numbers "
                "(dropout, stochastic depth)",
                "before_step",
            )

        hooks = [
            method.backbone.register_forward_pre_hook(start),
            method.backbone.register_forward_hook(stop, always_call=True),
        ]
        try:
            with method.uncompiled():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def before_regular_loss(self, method: BaseMethod, feats: list[torch.Tensor]) -> None:
        """The meta step of ``before_step``.

        Args:
            method: that trains.
            feats: of each view, (N, D) each, of this rank's own images, with their graph.
        """
        params = {name: p for name, p in method.backbone.named_parameters() if p.requires_grad}
        encoded = EncoderPass(torch.stack(list(feats)), params, self._tape, shared=True)
        self._tape = None  # what backward needs the graph has; the rest is free again
        step = method.step
        with torch.autocast(method.device.type, enabled=False):  # of the regular step, around this
            self.run(method, step.views, step.original, step.target_feats, encoded)

    def after_step(self, method: BaseMethod, step: Step, stepped: bool) -> None:
        """The meta step of ``after_step``, and after an epoch's last batch that of ``epoch_end``.

        Args:
            method: that trains.
            step: the iteration at hand.
            stepped: whether the main optimiser has stepped in it (gradient accumulation may skip it).
        """
        if self.cfg.when == "after_step" and stepped:
            batch = step.views, step.original, step.target_feats
            self._run_alone(method, step, batch, self.due(method.trainer.global_step))
        if self.cfg.when != "epoch_end" or not method.trainer.is_last_batch:
            return
        # ICL-MSR's second loop: the epoch's images once more, in the same order
        trainer, self._held = method.trainer, None
        for number, batch in enumerate(islice(trainer.train_dataloader, trainer.num_training_batches)):
            due = self.due(number + 1)
            if due or self.cfg.outer_batch == "next":
                batch = trainer.precision_plugin.convert_input(batch)  # as the trainer's own loop does
                indexes, views, labels = trainer.strategy.batch_to_device(batch)
                if method.hooks is not None:
                    method.hooks.before_batch(indexes, labels, number)
                self._run_alone(method, step, (*method.separate(views), None), due)

    def _run_alone(self, method: BaseMethod, step: Step, batch: Batch, due: bool) -> None:
        """A meta step that makes all its passes itself, if one is due.

        With ``outer_batch: next`` its inner step is of the batch before, of which an epoch's first batch has
        none.
        """
        outer: OuterBatch | None = None
        if self.cfg.batch_share < 1:
            count = max(2, math.ceil(self.cfg.batch_share * len(batch[0][0])))
            original = None if batch[1] is None else batch[1][:count]
            batch = [view[:count] for view in batch[0]], original, None
        if self.cfg.outer_batch == "next":
            outer, held = (batch[0], batch[2]), self._held
            self._held = (*batch[:2], None)
            batch = held
        if not due or batch is None:
            return
        if self.cfg.update_statistics:
            self._update_statistics(method, *batch)
        # Lightning moves a schedule before the meta step: at a drop the inner step would be another than the
        # regular step, and at the end of a cosine, where the rate is 0, there would be none
        groups = method.optimizers(use_pl_optimizer=False).param_groups
        moved = [group["lr"] for group in groups]
        for group, rate in zip(groups, step.rates or moved):
            group["lr"] = rate
        try:
            self.run(method, *batch, outer=outer)
        finally:
            for group, rate in zip(groups, moved):
                group["lr"] = rate

    @torch.no_grad()
    def _update_statistics(
        self,
        method: BaseMethod,
        views: list[torch.Tensor],
        original: torch.Tensor | None,
        target_feats: list[torch.Tensor] | None,
    ) -> None:
        """Moves the running statistics of encoder and heads by one pass at the new weights, M still the old.

        In MetaMask's release [0] the meta step's first forward is one of the network itself. Here the meta
        step's passes leave no trace, so this is one more, outside what a CUDA graph replays.

        [0] https://github.com/lionellee9089/MetaMask
        """
        if target_feats is None:
            target_feats = method.target_features(views, keep_statistics=True)
        with method.uncompiled():
            passes = [method(x) for x in views]
        keys = [key for key in ("feats", "maps") if key in passes[0]]
        out = {key: [one[key] for one in passes] for key in keys}
        if method.ranks is not None:
            out = {key: method.global_batch(views) for key, views in out.items()}
        method.regular_loss(out, target_feats, original)

    # The training around it.

    @property
    def resumes_within_epoch(self) -> bool:
        """Not where the next meta step needs the batch before, which no checkpoint holds."""
        return self.cfg.outer_batch == "same"

    def on_train_start(self, method: BaseMethod) -> None:
        """Checks the meta step against the trainer, and builds its optimiser.

        Raises:
            UserError: for what cannot be together.
        """
        trainer, main = method.trainer, method.optimizers(use_pl_optimizer=False)
        check_run(self.cfg, method, str(trainer.precision), trainer.world_size)
        self.start(method.meta_parameters(), main)
        by_value = trainer.gradient_clip_val and trainer.gradient_clip_algorithm == "value"
        check(
            not (by_value and follows(self.cfg.trial, self.cfg.inner_lr, main)),
            "gradient_clip_algorithm",
            "norm with a trial step that follows the optimiser",
            "value",
            "set gradient_clip_algorithm=norm, or ++method_kwargs.meta.inner_lr=1e-3",
        )
        self._warned = self._fell = False
        self._graph = None
        self._captures = self.can_capture(method)
        warning = missing_meta_steps(self.cfg, trainer)
        if warning is not None and trainer.is_global_zero:
            print(warning, flush=True)

    def can_capture(self, method: BaseMethod) -> bool:
        """Whether meta steps are to be replayed as a CUDA graph, and can be."""
        asked = OmegaConf.select(method.cfg, "performance.cuda_graph", default=False)
        alone = method.trainer.world_size == 1
        return bool(asked) and method.device.type == "cuda" and alone and method.task.capturable

    def start(self, parameters: Iterable[nn.Parameter], main: torch.optim.Optimizer) -> None:
        """Builds the meta optimiser, once the parameters are on their device; applies loaded state.

        Args:
            parameters: that the meta step trains.
            main: the main optimiser.

        Raises:
            UserError: if the inner step cannot be derived from the main optimiser.
        """
        cfg = self.cfg
        check_inner_step(cfg, main)
        self.optimizer = build_optimizer(
            cfg.optimizer.name,
            [{"params": list(parameters)}],
            cfg.optimizer.lr,
            cfg.optimizer.weight_decay,
            OmegaConf.to_container(cfg.optimizer.kwargs),
        )
        if self._state is None:
            return
        (group,) = self.optimizer.param_groups
        wanted = {key: value for key, value in group.items() if key != "params"}
        self.optimizer.load_state_dict(self._state["meta_optimizer"])
        if not cfg.decay_lr:  # the checkpoint has settings of its own; the config's apply
            self.optimizer.param_groups[0] |= wanted
        if "meta_gradients" in self._state:  # of this version on
            device = group["params"][0].device
            gradients = tree_map_only(torch.Tensor, lambda x: x.to(device), self._state["meta_gradients"])
            self._previous, self._gathered = gradients["previous"], gradients["gathered"]

    def on_epoch_start(self) -> None:
        """Forgets the batch before."""
        self._held = None

    def on_epoch_end(self, method: BaseMethod) -> None:
        """Warns, once, of an inner step that does the opposite of what it is for."""
        self._held = None
        metrics, trainer = method.trainer.callback_metrics, method.trainer
        if "train_trial_gain" not in metrics or self._warned:
            return
        gain, loss = float(metrics["train_trial_gain"]), float(metrics["train_inner_loss"])
        # a little below 0 in a single epoch, as at the end of a warm-up, is nothing to act on
        self._warned = gain < -OVERSHOOT * abs(loss) or (gain < 0 and self._fell)
        self._fell = gain < 0
        if self._warned and trainer.is_global_zero:
            print(overshoot(self.cfg, gain, trainer.current_epoch), flush=True)

    def on_fit_end(self) -> None:
        """Frees the CUDA graph, with the memory that it holds."""
        self._graph = None

    def state_dict(self) -> dict[str, Any]:
        """The meta optimiser's state and the meta-gradients still wanted, by their keys in a checkpoint."""
        if self.optimizer is None:
            return self._state or {}
        gradients = {"previous": self._previous, "gathered": self._gathered}
        return {"meta_optimizer": self.optimizer.state_dict(), "meta_gradients": gradients}

    def load_state_dict(self, checkpoint: dict[str, Any]) -> None:
        """Takes what :meth:`state_dict` has put into a checkpoint, once :meth:`start` is called."""
        if checkpoint.get("meta_optimizer") is not None:
            keys = ("meta_optimizer", "meta_gradients")
            self._state = {key: checkpoint[key] for key in keys if key in checkpoint}


def build_estimator(name: str, kwargs: dict[str, Any]) -> Estimator:
    """Builds an estimator by name (``method_kwargs.meta.estimator``) with its own settings."""
    estimator = ESTIMATORS[choose("method_kwargs.meta.estimator", name, ESTIMATORS)]
    try:
        return estimator(**kwargs)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"method_kwargs.meta.estimator_kwargs do not fit the estimator {name!r}: {error}"
        ) from error


def _random_state(images: torch.Tensor) -> torch.Tensor:
    return torch.cuda.get_rng_state(images.device) if images.is_cuda else torch.get_rng_state()
