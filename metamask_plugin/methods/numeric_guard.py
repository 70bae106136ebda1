"""Detects NaN and infinite losses, gradients and meta parameters, and stops or skips the step."""

from collections.abc import Iterable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from metamask_plugin.errors import NonFiniteError, choose

POLICIES = ("stop", "skip")
NAMED = 5
"""Tensors that a message names."""

DEFAULTS = {"on_nonfinite": "stop", "max_skipped_steps": 10, "collapse_below": 0.01}
"""The config's block ``numerics``."""


class NumericGuard:
    """Looks at losses, gradients and meta parameters once a step, and once a meta step, before they are used.

    What is found ends the run, or leaves the step out:

    - ``numerics.on_nonfinite: stop``: a :class:`~metamask_plugin.errors.NonFiniteError` with what was seen.
      On the CPU nothing has been changed by then but the running statistics of BatchNorm. On a GPU the
      answer is read one look later, so that no step waits for the device, and one step has been made with
      these numbers. No checkpoint is saved before the answer is known.
    - ``skip``: no parameter moves, BatchNorm's statistics go back to what they were, and there is no meta
      step and no update of queues and target networks. After more than
      ``numerics.max_skipped_steps`` of them in a run it stops. Each look waits for the device.

    Gradients that overflow in float16 are no error: the gradient scaler skips that step and scales less. The
    meta step and what follows an optimiser's step are left out then, too.

    Args:
        cfg: the host's configuration; of it the block ``numerics``.

    Attributes:
        passed_over: whether the optimiser's latest step changed nothing.
        skipped: steps left out so far.
        skips: whether steps may be left out.
        batches: losses, scalars without a graph by name, and indexes of the images, (N,), of each batch since
            the optimiser's latest step.
    """

    def __init__(self, cfg: DictConfig):
        settings = {**DEFAULTS, **(OmegaConf.select(cfg, "numerics") or {})}
        self.skips = choose("numerics.on_nonfinite", settings["on_nonfinite"], POLICIES) == "skip"
        self.max_skipped: int = settings["max_skipped_steps"]
        self.skipped = 0
        self.passed_over = False
        self.batches: list[tuple[dict[str, torch.Tensor], torch.Tensor]] = []
        self._statistics: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._unread: Look | None = None

    def keep_statistics(self, method: nn.Module) -> None:
        """Before a batch's forward passes: what BatchNorm's statistics go back to if the step is left out."""
        if not self.batches:  # accumulated batches are left out together
            self._statistics = [
                (buffer, buffer.clone())
                for module in method.modules()
                if isinstance(module, _NormBase)
                for buffer in module.buffers(recurse=False)
            ]

    def before_step(
        self, method: pl.LightningModule, optimizer: torch.optim.Optimizer, views: list[torch.Tensor]
    ) -> None:
        """Between the backward pass and the optimiser's step.

        Args:
            method: what is trained.
            optimizer: about to step.
            views: images of the latest batch's views, (N, 3, H, W) each.

        Raises:
            NonFiniteError: as the class says.
        """
        trained = {
            name: parameter.grad
            for name, parameter in method.named_parameters()
            if parameter.grad is not None and parameter.requires_grad
        }
        self.read()
        losses: dict[str, torch.Tensor] = {}
        for batch, _ in self.batches:  # of accumulated batches the sum: it is finite if all are
            losses = {name: loss + losses.get(name, 0.0) for name, loss in batch.items()}
        look = Look(method, optimizer, losses, trained)
        look.indexes = [indexes for _, indexes in self.batches]
        look.finite_views = [view.isfinite().all() for view in views]
        scaled = getattr(method.trainer.precision_plugin, "scaler", None) is not None
        self.passed_over = False
        if self._deferred(method) and not scaled:
            self._unread = look
        elif look.failed:
            self.passed_over = True
            if not (scaled and look.only_gradients):
                self._refuse(look)
                # to every optimiser a parameter without gradient is none
                optimizer.zero_grad(set_to_none=True)
                for buffer, before in self._statistics:
                    buffer.copy_(before)
        self.batches, self._statistics = [], []

    def before_meta_step(
        self, method: pl.LightningModule, outer_loss: torch.Tensor, parameters: Iterable[nn.Parameter]
    ) -> bool:
        """Between the meta-gradient and the meta optimiser's step.

        Args:
            method: what is trained.
            outer_loss: L_out, a scalar.
            parameters: the meta parameters, with their ``.grad``.

        Returns:
            Whether the step is to be made.

        Raises:
            NonFiniteError: as the class says.
        """
        self.read()
        parameters = list(parameters)
        numbered = {f"meta parameter {i}": parameter for i, parameter in enumerate(parameters)}
        values = {"train_outer_loss": outer_loss.detach(), **_norms(numbered)}
        look = Look(method, None, values, {name: parameter.grad for name, parameter in numbered.items()})
        if self._deferred(method):
            self._unread = look
            return True
        if look.failed:
            self._refuse(look)
            for parameter in parameters:
                parameter.grad = None
        return not look.failed

    def read(self) -> None:
        """Reads the answer of the latest look, where that is still to be read.

        Raises:
            NonFiniteError: as the class says.
        """
        look, self._unread = self._unread, None
        if look is not None and look.failed:
            self._refuse(look)

    def _deferred(self, method: pl.LightningModule) -> bool:
        return method.device.type == "cuda" and not self.skips

    def _refuse(self, look: "Look") -> None:
        """Counts a failure; raises where it is one too many."""
        seen = look.seen()
        if self.skips and self.skipped < self.max_skipped:
            self.skipped += 1
            print(
                f"warning: step left out ({self.skipped} of at most {self.max_skipped}): {_told(seen)}",
                flush=True,
            )
            return
        remedy = "lower optimizer.lr or method_kwargs.alpha, clip gradients (gradient_clip_val)"
        if seen["nonfinite_views"]:
            remedy = "look at the images of these indexes"
        limit = f"; {self.skipped} steps were left out before" if self.skipped else ""
        raise NonFiniteError(f"numbers must be finite, got {_told(seen)}{limit}; {remedy}", seen)

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped = state["skipped"]


class Look:
    """The numbers of one step, and whether all of them are finite, on every process.

    From a GPU the answer travels to the host while both go on; :attr:`failed` waits until it has arrived.

    Args:
        method: what is trained.
        optimizer: whose step it is; None for the meta step.
        values: scalars by name.
        gradients: by name.

    Attributes:
        indexes: of the images in the data set, (N,) a batch.
        finite_views: of each view of the latest batch whether all its pixels are finite, a scalar.
    """

    def __init__(
        self,
        method: pl.LightningModule,
        optimizer: torch.optim.Optimizer | None,
        values: dict[str, torch.Tensor],
        gradients: dict[str, torch.Tensor],
    ):
        trainer = method.trainer
        self.indexes: list[torch.Tensor] = []
        self.finite_views: list[torch.Tensor] = []
        self._where = {
            "epoch": trainer.current_epoch,
            "step": trainer.global_step,
            "rank": trainer.global_rank,
            "learning_rates": [] if optimizer is None else [group["lr"] for group in optimizer.param_groups],
        }
        self._values = values
        self._gradients = _norms(gradients)
        groups = values, self._gradients
        bad = torch.stack([_any_nonfinite(scalars, method.device) for scalars in groups])
        if trainer.world_size > 1:  # all stop, or leave out, together
            bad = trainer.strategy.reduce(bad, reduce_op="sum")
        self._arrived = torch.cuda.Event() if bad.is_cuda else None
        self._bad = bad.to("cpu", non_blocking=bad.is_cuda)
        if self._arrived is not None:
            self._arrived.record()

    @property
    def failed(self) -> bool:
        """Whether a number is not finite, on any process."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._bad.any())

    @property
    def only_gradients(self) -> bool:
        """Whether all values are finite; to be asked after :attr:`failed`."""
        return not bool(self._bad[0])

    def seen(self) -> dict[str, Any]:
        """What a report of a failure says."""
        return {
            **self._where,
            "nonfinite": _nonfinite(self._values),
            "nonfinite_gradients": _nonfinite(self._gradients),
            "losses": {name: float(value) for name, value in self._values.items()},
            "nonfinite_views": [i for i, finite in enumerate(self.finite_views) if not bool(finite)],
            "indexes": [index for batch in self.indexes for index in batch.tolist()],
        }


def _norms(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(zip(tensors, torch._foreach_norm([tensor.detach() for tensor in tensors.values()])))


def _any_nonfinite(scalars: Mapping[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """1 or 0, a scalar."""
    if not scalars:
        return torch.zeros((), device=device)
    return (~torch.stack([x.float() for x in scalars.values()]).isfinite()).any().float()


def _nonfinite(scalars: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(x) for name, x in scalars.items() if not bool(x.isfinite())}


def _told(seen: dict[str, Any]) -> str:
    bad = [f"{name} = {value}" for name, value in seen["nonfinite"].items()]
    bad += [f"the gradient of {name}" for name in seen["nonfinite_gradients"]]
    what = ", ".join(bad[:NAMED]) or "a number of another process that is not"
    more = f" and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
    views = (
        f", with pixels that are not in view {seen['nonfinite_views'][0]}" if seen["nonfinite_views"] else ""
    )
    return f"{what}{more} in epoch {seen['epoch'] + 1}, step {seen['step']}{views}"
