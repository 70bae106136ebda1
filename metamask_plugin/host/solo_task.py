"""Any method of an installed solo-learn as a task: ``method_kwargs.task: solo:byol``.

The method is solo-learn's own object, with its own heads, loss, queue and settings; nothing of it is
restated here. Where it has a backbone it gets a stand-in, which hands out features that are there
already, so that masked features, adapted parameters and the target network's features can be put through its
``training_step`` like images.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.host.solo_settings import NOT_TASKS, PREFIX, WITH_MSR
from metamask_plugin.tasks.base import Positives, Projections, TargetNetwork, Task, TaskOutput


class HostTask(Task):
    """A task that depends on more than features: what it is told besides, and asked.

    Attributes:
        gathers_itself: whether its loss gathers other ranks' samples, and is to be given this rank's alone.
        loss_may_be_nan: where it has nothing to compare, with a gradient of zero.
        resumes_within_epoch: whether parameters and buffers are all that an epoch's next batch depends on.
    """

    gathers_itself: bool = False
    loss_may_be_nan: bool = False
    resumes_within_epoch: bool = True

    def parameter_groups(self) -> list[dict[str, Any]] | None:
        """What the main optimiser trains of the task, in groups; None: all of it that requires a gradient."""
        return None

    def check_meta_step(self, ranks: int) -> None:
        """Raises a UserError where the loss has no second derivative.

        Args:
            ranks: how many train together.
        """

    def start_training(self, trainer: Any) -> None:
        """Called once training starts, with Lightning's trainer."""

    def start_epoch(self) -> None:
        """Called when an epoch starts."""

    def before_batch(self, indexes: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        """Called before a batch's losses are evaluated.

        Args:
            indexes: of the images in the data set, (N,).
            labels: (N,), -1 where there is none.
            number: of the batch in its epoch, from 0.
        """

    def before_regular_loss(self) -> None:
        """Called before the regular loss of a batch, which a meta step may precede or follow."""

    def after_backward(self) -> None:
        """Called between the regular loss's backward pass and the optimiser's step."""


class SoloTask(HostTask):
    """A method of solo-learn on features that are given to it.

    Its loss is its ``training_step`` without the online classifier's part. That step moves queues, memory
    banks and running statistics; here it moves copies, and :meth:`after_batch` keeps those of the regular
    loss. Hooks that the method has (SwAV's frozen prototypes, DINO's clipping, DeepCluster's k-means) are
    called when solo-learn calls them. What it logs is dropped.

    Args:
        cfg: the host's config; ``method_kwargs.task_kwargs`` are the method's own ``method_kwargs``, with its
            ``momentum`` block among them.
        features_dim: D, the encoder's output.
        views: numbers of large and of small crops.

    Raises:
        UserError: where solo-learn is missing, has no such method, or refuses the settings.
    """

    gathers_itself = True  # solo-learn's losses gather what they need themselves
    capturable = False  # they may change from epoch to epoch

    resumes_within_epoch = False  # what solo-learn's methods prepare when an epoch starts is in no buffer

    def __init__(self, cfg: DictConfig, features_dim: int, views: tuple[int, int]):
        super().__init__(features_dim)
        name = cfg.method_kwargs.task.removeprefix(PREFIX)
        method = _build(name, cfg, views)
        self.name = name
        self.loss_may_be_nan = name == "deepclusterv2"  # in its first epoch all images are of no cluster
        self.source = f"solo-learn's {type(method).__name__}"
        self.negatives = "solo-learn's own"
        self.projection_dim = cfg.method_kwargs.task_kwargs.proj_output_dim
        self.step = _TrainingStep(method)
        # how far the target network has come: solo-learn takes this step's tau from the last one's
        self.register_buffer("progress", torch.zeros((), dtype=torch.float64))
        self._batch = self._moved = None
        self._settle_weight_norm()

    @property
    def method(self) -> nn.Module:
        """The solo-learn method."""
        return self.step.method

    def project(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """The method's own ``z``."""
        return self.method(_View(feats, feats))["z"]

    def project_key(self, feats: torch.Tensor, view: int = 0) -> torch.Tensor:
        """The features as they are: the method projects them itself."""
        return feats

    def forward(
        self, feats: Sequence[torch.Tensor], target_feats: Sequence[torch.Tensor] | None = None
    ) -> TaskOutput:
        """The loss, with features in the place of projections."""
        return TaskOutput(self.loss(feats, target_feats), feats, target_feats)

    def before_batch(self, indexes: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        self._batch = (indexes, labels, number)

    def before_regular_loss(self) -> None:
        self._moved = None

    def loss(self, projections: Projections, targets=None, positives=None) -> torch.Tensor:
        """The method's loss of one batch.

        Args:
            projections: features of each view, (N, D) each, large crops first.
            targets: the target network's features of the large crops, for a method that has one.
            positives: what takes one view's place at a time, (N, n, D) each; averaged over views and strata.
        """
        if positives is not None:
            return self._loss_on_strata(projections, positives)
        targets = projections if targets is None else [*targets, *projections[len(targets) :]]
        views = [_View(*pair) for pair in zip(projections, targets)]
        indexes, labels, number = self._batch or self._unlabelled(projections[0])
        count = len(projections[0])  # the meta step may take the first part of a batch
        indexes, labels = indexes[:count], labels[:count]
        buffers = {name: buffer.clone() for name, buffer in self.step.named_buffers()}
        with sdpa_kernel(SDPBackend.MATH):  # All4One's transformer; the fused ones have no second derivative
            loss = torch.func.functional_call(self.step, buffers, ([indexes, views, labels], number))
        if self._moved is None:  # the first evaluation since before_regular_loss
            self._moved = buffers
        return loss

    def _unlabelled(self, feats: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, int]:
        count = len(feats)
        return torch.arange(count, device=feats.device), feats.new_zeros(count, dtype=torch.long), 0

    def _loss_on_strata(self, projections: Projections, positives: Positives) -> torch.Tensor:
        check(
            self.name in WITH_MSR,
            "method_kwargs.task",
            f"one of {', '.join(PREFIX + name for name in WITH_MSR)} for ICL-MSR",
            PREFIX + self.name,
            "its positives do not stand alone in the loss; take this package's own task of that name",
        )
        losses = []
        for view, strata in enumerate(positives):
            for stratum in strata.unbind(1):
                losses.append(self.loss([*projections[:view], stratum, *projections[view + 1 :]]))
        return torch.stack(losses).mean()

    def init_target(self, backbone: nn.Module) -> None:
        self.method.backbone.stand_for(backbone)
        if hasattr(self.method, "momentum_updater"):
            self.target = TargetNetwork(backbone, nn.Identity())
            self.method.momentum_backbone.stand_for(self.target.trunk)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The method's own, without encoder and classifiers."""
        elsewhere = ("backbone", "classifier", "momentum_classifier")
        groups = [g for g in self.method.learnable_params if g.get("name") not in elsewhere]
        return [{**group, "params": list(group["params"])} for group in groups]

    def check_meta_step(self, ranks: int) -> None:
        own = PREFIX + self.name
        check(
            ranks == 1,
            "method_kwargs.task",
            "one of this package's own where several processes train",
            own,
            "what solo-learn's losses gather from other processes is differentiated once only",
        )
        settings = self.method.cfg.method_kwargs
        check(
            not settings.get("iternorm"),
            "method_kwargs.task_kwargs.iternorm",
            f"False for a meta step over {own}",
            settings.get("iternorm"),
            "solo-learn's IterNorm is differentiated once only",
        )

    def start_training(self, trainer: Any) -> None:
        """Hands the method its trainer; what it builds only now does not overwrite what was loaded."""
        self.method.trainer = trainer
        loaded = dict(self.method.named_buffers())
        self.method.on_train_start()
        for name, buffer in self.method.named_buffers():
            if name in loaded and buffer.shape == loaded[name].shape:
                buffer.copy_(loaded[name])

    def start_epoch(self) -> None:
        self.method.on_train_epoch_start()

    def after_backward(self) -> None:
        self.method.on_after_backward()

    @torch.no_grad()
    def after_batch(self, projections: Projections, targets: Projections | None) -> None:
        for name, buffer in self.step.named_buffers():
            if self._moved is not None and name in self._moved:
                buffer.copy_(self._moved[name])
        self._moved = None
        self._settle_weight_norm()

    @torch.no_grad()
    def after_step(self, backbone: nn.Module, progress: float) -> None:
        updater = getattr(self.method, "momentum_updater", None)
        if updater is not None:
            updater.update_tau(self.progress.item(), 1)
            for online, target in self.method.momentum_pairs:
                updater.update(online, target)
        self.progress.fill_(progress)

    def _settle_weight_norm(self) -> None:
        """Cuts normalised weights from the graph that made them: with one no module can be copied."""
        for module in self.method.modules():
            weight = vars(module).get("weight")
            if isinstance(weight, torch.Tensor):
                module.weight = weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args) -> None:
        """Makes room for buffers that solo-learn registers when training starts (SwAV's queue)."""
        own = f"{prefix}step.method."
        for key, value in state_dict.items():
            name = key.removeprefix(own)
            if key.startswith(own) and "." not in name and name not in self.method.state_dict():
                self.method.register_buffer(name, torch.zeros_like(value))
        super()._load_from_state_dict(state_dict, prefix, *args)


@dataclass(frozen=True)
class _View:
    """What stands for a view's images: its features, and the target network's of the same view."""

    online: torch.Tensor
    target: torch.Tensor


class _StandIn(nn.Module):
    """A backbone that has its features from elsewhere; it speaks for that one's parameters.

    Args:
        branch: ``online`` or ``target``.
    """

    def __init__(self, branch: str):
        super().__init__()
        self.branch = branch
        self._principal: list[nn.Module] = []  # in a list: as an attribute it would be a submodule

    def stand_for(self, module: nn.Module) -> None:
        self._principal = [module]

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """The encoder's: DINO clips their gradients, and the target network follows them."""
        return self._principal[0].parameters(recurse) if self._principal else super().parameters(recurse)

    def forward(self, view: _View) -> torch.Tensor:
        return getattr(view, self.branch)


class _NoClassifier(nn.Module):
    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        return feats[:, :0]


class _OnFeatures:
    """What solo-learn's methods do otherwise here: no online classifier, and no log of their own."""

    def _base_shared_step(self, X: _View, targets: torch.Tensor) -> dict[str, Any]:
        nothing = X.online.new_zeros(())
        return {**self(X), "loss": nothing, "acc1": nothing, "acc5": nothing}

    def log(self, *args, **kwargs) -> None:
        pass

    def log_dict(self, *args, **kwargs) -> None:
        pass


class _TrainingStep(nn.Module):
    """A method's training step as a module's forward, which can be called with other tensors."""

    def __init__(self, method: nn.Module):
        super().__init__()
        self.method = method

    def forward(self, batch: list, number: int) -> torch.Tensor:
        return self.method.training_step(batch, number)


def _build(name: str, cfg: DictConfig, views: tuple[int, int]) -> nn.Module:
    setting = "method_kwargs.task"
    try:
        from metamask_plugin.host import solo  # with our encoders among its own
    except ImportError as error:
        raise UserError(
            f"{setting}={PREFIX + name} needs solo-learn's main branch, which cannot be imported "
            f"({error}); install it from its repository, or take one of this package's own tasks"
        ) from error
    if name in NOT_TASKS:
        raise UserError(f"{setting} must be a method with a loss on features, not {name}: {NOT_TASKS[name]}")
    choose(setting, PREFIX + name, [PREFIX + method for method in task_names(solo.METHODS)])
    own = _method_config(name, cfg, views)
    _check_batch(own)
    constructor = solo.METHODS[name]
    try:
        method = type(f"{constructor.__name__}OnFeatures", (_OnFeatures, constructor), {})(own)
    except (AssertionError, TypeError, AttributeError) as error:
        raise UserError(
            f"method_kwargs.task_kwargs do not fit {PREFIX + name}: {error}; its settings are those of "
            "solo-learn's own config of that method"
        ) from error
    method.no_channel_last = True
    method.classifier = _NoClassifier()
    method.backbone = _StandIn("online")
    if hasattr(method, "momentum_backbone"):
        method.momentum_backbone = _StandIn("target")
    return method


def task_names(methods: Iterable[str]) -> list[str]:
    """Which of solo-learn's methods can be tasks; ours are no tasks of themselves."""
    ours = ("bare", "baseline", "icl_msr", "metamask", "supervised")
    return sorted(name for name in methods if name not in ours and name not in NOT_TASKS)


def _method_config(name: str, cfg: DictConfig, views: tuple[int, int]) -> DictConfig:
    """The run's config as the method alone would be given it."""
    settings = cfg.method_kwargs.task_kwargs.copy()
    momentum = settings.pop("momentum")
    own = cfg.copy()
    OmegaConf.set_struct(own, False)
    large, small = views
    return OmegaConf.merge(
        {**own, "method_kwargs": {}},
        {
            "method": name,
            "method_kwargs": settings,
            "momentum": {**momentum, "classifier": False},
            "data": {"num_large_crops": large, "num_small_crops": small},
            "knn_eval": {"enabled": False},
        },
    )


def _check_batch(own: DictConfig) -> None:
    """solo-learn says the same with a bare assert, in the first step."""
    batch = own.optimizer.batch_size
    size = own.method_kwargs.get("queue_size") if own.method != "swav" else None
    name = "method_kwargs.task_kwargs"
    check(not size or size % batch == 0, f"{name}.queue_size", f"a multiple of the batch size {batch}", size)
    size = own.method_kwargs.get("whitening_size")
    check(
        not size or batch % size == 0, f"{name}.whitening_size", f"a divisor of the batch size {batch}", size
    )
