"""Linear and MLP probes on frozen features that were extracted once."""

import math
import sys
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.features import Accuracy, Features, accuracy, top_hits

OPTIMIZERS = ("adam", "adamw", "sgd")
SCHEDULERS = ("none", "step", "cosine", "exponential")
HEADS = ("linear", "mlp")
SCALINGS = ("standardise", "l2")

# The paper (Section 6.1) re-trains "an MLP" and gives no sizes; one hidden layer of 200 units is the
# classifier of Deep InfoMax (Hjelm et al., ICLR 2019), where its conv and fc encoders come from.
MLP_HIDDEN_DIM = 200

# a training that ends with so many times the loss of guessing has diverged
DIVERGED = 2

# multiplications in the first layer for a batch; 256 features into an MLP at batch 1000 are half of it
SINGLE_THREAD_BELOW = 100_000_000


@dataclass(frozen=True)
class LinearProtocol:
    """How a probe is trained.

    Attributes:
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        lr: learning rate of the first epoch, as it is used: not scaled by the batch size.
        epochs: passes over the training features.
        batch_size: the last, smaller batch of an epoch is used too.
        weight_decay: on all parameters of the head.
        momentum: of SGD.
        scheduler: ``none``, ``step``, ``cosine`` or ``exponential``, per epoch.
        lr_end: learning rate after the last epoch for ``cosine`` and ``exponential``.
        lr_decay_steps: epochs after which ``step`` divides the learning rate by 10.
        scaling: of the features: ``standardise`` each dimension by the training features' mean and standard
            deviation, or ``l2``, each image's features to unit length.

    Raises:
        UserError: for a setting that does not exist or is out of range.

    Example:
        >>> protocol = LinearProtocol("sgd", lr=0.1, epochs=100, batch_size=256, scheduler="cosine")
        >>> protocol.lr_at(0), round(protocol.lr_at(50), 3)
        (0.1, 0.05)
    """

    optimizer: str
    lr: float
    epochs: int
    batch_size: int
    weight_decay: float = 0.0
    momentum: float = 0.9
    scheduler: str = "none"
    lr_end: float = 0.0
    lr_decay_steps: tuple[int, ...] = ()
    scaling: str = "standardise"

    def __post_init__(self):
        choose("optimizer.name", self.optimizer, OPTIMIZERS)
        choose("scheduler.name", self.scheduler, SCHEDULERS)
        choose("scaling", self.scaling, SCALINGS)
        check(self.lr > 0, "optimizer.lr", "> 0", self.lr)
        check(self.epochs >= 1, "max_epochs", ">= 1", self.epochs)
        check(self.batch_size >= 1, "optimizer.batch_size", ">= 1", self.batch_size)
        check(self.weight_decay >= 0, "optimizer.weight_decay", ">= 0", self.weight_decay)
        if self.scheduler == "exponential":
            check(self.lr_end > 0, "scheduler.min_lr", "> 0 for the exponential schedule", self.lr_end)

    def lr_at(self, epoch: float) -> float:
        """Learning rate of an epoch, counted from 0; within it for a fraction."""
        done = epoch / self.epochs
        if self.scheduler == "step":
            return self.lr * 0.1 ** sum(epoch >= step for step in self.lr_decay_steps)
        if self.scheduler == "cosine":
            return self.lr_end + (self.lr - self.lr_end) * (1 + math.cos(math.pi * done)) / 2
        if self.scheduler == "exponential":
            return self.lr * (self.lr_end / self.lr) ** done
        return self.lr

    def build_optimizer(
        self, network: nn.Module, nesterov: bool = False, **options: Any
    ) -> torch.optim.Optimizer:
        """The optimiser of the parameters that have gradients.

        Args:
            network: what is trained.
            nesterov: of SGD with momentum.
            options: further ones of torch's optimiser.
        """
        parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
        options = {"lr": self.lr, "weight_decay": self.weight_decay, **options}
        if self.optimizer == "sgd":
            nesterov = nesterov and self.momentum > 0
            return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=nesterov, **options)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, **options)


PAPER = LinearProtocol(
    "adam", lr=1e-2, epochs=500, batch_size=1000, weight_decay=5e-6, scheduler="exponential", lr_end=1e-6
)

PROTOCOLS: dict[str, LinearProtocol] = {
    # ICL-MSR, Section 6.2: Adam, 500 epochs. Rates, batch and weight decay are those of the W-MSE code base,
    # whose settings it follows. MetaMask gives no settings of its probe: the same.
    "paper": PAPER,
    # and "the obtained feature representations are L2 normalized" (Section 6.2)
    "icl_msr": replace(PAPER, scaling="l2"),
    # solo-learn's scripts/linear: 0.1 * batch_size / 256, here without its training augmentations
    "solo": LinearProtocol(
        "sgd", lr=0.1, epochs=100, batch_size=256, scheduler="step", lr_decay_steps=(60, 80)
    ),
    # for a look during development; not a number to report
    "fast": LinearProtocol("adam", lr=1e-2, epochs=100, batch_size=256, scheduler="cosine"),
}


@dataclass(frozen=True)
class ProbeResult:
    """What a trained classifier reached on the test images.

    Attributes:
        accuracies: after every epoch.
        correct: which test images are classified rightly after the last epoch, bool (N,).
        images: number of labelled images trained on.
        steps: number of optimiser steps.
        state_dict: after the last epoch, on the CPU: of :func:`build_head`, which takes the features as
            extracted; or ``backbone.*`` and ``classifier.*`` where the encoder was trained, too.

    Example:
        >>> curve = (Accuracy(50.0, 90.0), Accuracy(70.0, 100.0), Accuracy(60.0, 100.0))
        >>> result = ProbeResult(curve, torch.tensor([True, False]), images=10, steps=30, state_dict={})
        >>> result.acc1_last, result.acc1_best, result.best_epoch
        (60.0, 70.0, 2)
    """

    accuracies: tuple[Accuracy, ...]
    correct: torch.Tensor
    images: int
    steps: int
    state_dict: dict[str, torch.Tensor]

    @property
    def epochs(self) -> int:
        """Number of epochs trained."""
        return len(self.accuracies)

    @property
    def best_epoch(self) -> int:
        """By top-1 on the test images, as the papers' code chooses it; counted from 1."""
        return 1 + max(range(self.epochs), key=lambda epoch: self.accuracies[epoch].acc1)

    @property
    def acc1_last(self) -> float:
        """Top-1 after the last epoch, percent."""
        return self.accuracies[-1].acc1

    @property
    def acc5_last(self) -> float:
        """Top-5 after the last epoch, percent (100 with five classes or fewer)."""
        return self.accuracies[-1].acc5

    @property
    def acc1_best(self) -> float:
        """Top-1 of the best epoch, percent."""
        return self.accuracies[self.best_epoch - 1].acc1

    @property
    def acc5_best(self) -> float:
        """Top-5 of the best epoch, percent."""
        return self.accuracies[self.best_epoch - 1].acc5


class UnitLength(nn.Module):
    """Scales features (N, D) to length 1.

    Example:
        >>> UnitLength()(torch.tensor([[3.0, 4.0]]))
        tensor([[0.6000, 0.8000]])
    """

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        return F.normalize(feats, dim=1)


def build_head(head: str, dim: int, num_classes: int, scaling: str = "standardise") -> nn.Sequential:
    """A classification head with the scaling of its input as its first layer.

    Use it in evaluation mode: the standardisation is a BatchNorm without affine parameters whose
    statistics are those of the training features. Its weights are uninitialised, to be loaded.

    Args:
        head: ``"linear"``, or ``"mlp"`` with one hidden layer of 200 units and ReLU.
        dim: D.
        num_classes: C.
        scaling: see :class:`LinearProtocol`.

    Example:
        >>> build_head("mlp", dim=64, num_classes=10).state_dict()["classifier.0.weight"].shape
        torch.Size([200, 64])
    """
    choose("head", head, HEADS)
    widths = [dim, num_classes] if head == "linear" else [dim, MLP_HIDDEN_DIM, num_classes]
    layers = []
    for width_in, width_out in zip(widths, widths[1:]):
        # skip_init: nn.Linear's own initialisation would draw from the global generator
        layers += [nn.utils.skip_init(nn.Linear, width_in, width_out), nn.ReLU()]
    # torch 2.9 to 2.14 refuse an eps of 0; this one changes no variance above 1e-31
    standardise = nn.BatchNorm1d(dim, eps=torch.finfo(torch.float32).tiny, affine=False)
    first = {"standardise": standardise} if scaling == "standardise" else {"unit_length": UnitLength()}
    return nn.Sequential(OrderedDict(**first, classifier=nn.Sequential(*layers[:-1])))


def linear_probe(
    train: Features,
    test: Features,
    num_classes: int,
    protocol: str | LinearProtocol = "paper",
    head: str = "linear",
    seed: int = 0,
    device: torch.device | str | None = None,
    mask: torch.Tensor | None = None,
) -> ProbeResult:
    """Trains a classification head on frozen features and tests it after every epoch.

    Features are scaled first (:class:`LinearProtocol`), so that one learning rate fits encoders of any
    scale. The mask is applied after that, since standardising would undo it: dimensions with a small weight
    then learn more slowly, those at 0 not at all.

    Args:
        train: (M, D).
        test: (N, D).
        num_classes: C.
        protocol: a key of :data:`PROTOCOLS`, or a protocol of your own.
        head: ``"linear"`` or ``"mlp"``.
        seed: of the initial weights and the order of the batches; the global generators stay untouched.
        device: where to train; by default where the features are.
        mask: effective weights (D,), or None.

    Raises:
        UserError: for features or labels that do not fit, or when the loss is no longer finite.

    Example:
        >>> feats = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> features = Features(feats, (feats[:, 0] > 0).long())
        >>> linear_probe(features, features, num_classes=2, protocol="fast").acc1_last > 80
        True
    """
    if isinstance(protocol, str):
        protocol = PROTOCOLS[choose("protocol", protocol, PROTOCOLS)]
    _check_features(train, test, num_classes)
    device = torch.device(device) if device is not None else train.feats.device
    generator = torch.Generator().manual_seed(seed)
    network = build_head(head, train.feats.shape[1], num_classes, protocol.scaling)
    if protocol.scaling == "standardise":
        feats = train.feats.cpu() if train.feats.device.type == "mps" else train.feats  # it has no float64
        variance, mean = torch.var_mean(feats.double(), dim=0, correction=0)
        # a dimension that never varies beyond rounding (a dead ReLU) has no scale: do not blow it up
        variance[variance <= 1e-12 * mean**2] = 1.0
        network.standardise.running_mean.copy_(mean)
        network.standardise.running_var.copy_(variance)
    _initialise(network.classifier, generator)
    network.to(device).eval()
    mask = torch.ones(train.feats.shape[1]) if mask is None else mask.detach().float()
    check(mask.shape == train.feats.shape[1:], "mask", f"of length {train.feats.shape[1]}", tuple(mask.shape))
    prepared = [
        Features(network[0](split.feats.to(device)).mul_(mask.to(device)), split.labels.to(device))
        for split in (train, test)
    ]
    with _threads_for(train.feats.shape[1] * (MLP_HIDDEN_DIM if head == "mlp" else num_classes), protocol):
        accuracies, correct = _train(network.classifier, *prepared, protocol, generator)
    with torch.no_grad():  # fold the mask into the first layer, so that the head takes plain features
        network.classifier[0].weight.mul_(mask.to(device))
    state = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
    images = len(train.labels)
    steps = protocol.epochs * math.ceil(images / protocol.batch_size)
    return ProbeResult(tuple(accuracies), correct, images, steps, state)


@contextmanager
def _threads_for(weights: int, protocol: LinearProtocol) -> Iterator[None]:
    # thousands of tiny steps: two threads save a third at best, and on a busy machine they spend several
    # times the whole on waiting for each other (measured: 28 s instead of 7 s)
    threads = torch.get_num_threads()
    if weights * protocol.batch_size < SINGLE_THREAD_BELOW:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _check_features(train: Features, test: Features, num_classes: int) -> None:
    dims = (train.feats.shape[1], test.feats.shape[1])
    check(dims[0] == dims[1], "training and test features", "of one dimension", dims)
    for name, split in (("training", train), ("test", test)):
        check(len(split.labels) > 0, f"{name} features", "at least one", 0)
        low, high = int(split.labels.min()), int(split.labels.max())
        fits = low >= 0 and high < num_classes
        check(fits, f"{name} labels", f"from 0 to {num_classes - 1}", (low, high), "check data.dataset")


def _initialise(classifier: nn.Sequential, generator: torch.Generator) -> None:
    """PyTorch's default for nn.Linear, uniform within 1 / sqrt(fan_in), from our own generator."""
    with torch.no_grad():
        for layer in classifier:
            if isinstance(layer, nn.Linear):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=generator)
                layer.bias.uniform_(-bound, bound, generator=generator)


def _train(
    classifier: nn.Sequential,
    train: Features,
    test: Features,
    protocol: LinearProtocol,
    generator: torch.Generator,
) -> tuple[list[Accuracy], torch.Tensor]:
    """Returns the accuracy after every epoch, and which test features are right after the last."""
    # fused: one call instead of a dozen, which on small heads is half of the time
    optimizer = protocol.build_optimizer(classifier, fused=True)
    accuracies = []
    for epoch in range(protocol.epochs):
        set_rate(optimizer, protocol.lr_at(epoch))
        order = torch.randperm(len(train.labels), generator=generator).to(train.labels.device)
        batches = ((train.feats[batch], train.labels[batch]) for batch in order.split(protocol.batch_size))
        train_epoch(classifier, batches, optimizer, "the probe's loss", protocol, epoch)
        with torch.no_grad():
            hits = top_hits(classifier(test.feats), test.labels)
        accuracies.append(accuracy(hits))
    with torch.no_grad():
        logits = classifier(train.feats)
        loss = F.cross_entropy(logits, train.labels).item()
    warn_of_divergence("the probe", loss, logits.shape[1], protocol.lr)
    return accuracies, hits[:, 0].cpu()


def set_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of all parameters.

    Example:
        >>> optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
        >>> set_rate(optimizer, 0.1)
        >>> optimizer.param_groups[0]["lr"]
        0.1
    """
    for group in optimizer.param_groups:
        group["lr"] = lr


def train_epoch(
    network: nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    optimizer: torch.optim.Optimizer,
    what: str,
    protocol: LinearProtocol,
    epoch: int,
) -> float:
    """One pass over batches of inputs and labels, by cross-entropy.

    Args:
        network: from inputs to logits.
        batches: of one epoch.
        optimizer: of the network.
        what: the loss that must stay finite, for messages.
        protocol: likewise.
        epoch: likewise, counted from 0.

    Returns:
        The mean loss.

    Raises:
        UserError: a loss is no longer finite.

    Example:
        >>> network = nn.Linear(2, 2)
        >>> optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
        >>> batches = [(torch.eye(2), torch.tensor([0, 1]))]
        >>> first = train_epoch(network, batches, optimizer, "the loss", PAPER, epoch=0)
        >>> train_epoch(network, batches, optimizer, "the loss", PAPER, epoch=1) < first
        True
    """
    losses = []
    # this may be called from a validation hook, where gradients are off
    with torch.inference_mode(False), torch.enable_grad():
        for x, y in batches:
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    mean = torch.stack(losses).mean().item()  # asked once an epoch: every question waits for the GPU
    if not math.isfinite(mean):
        raise UserError(
            f"optimizer.lr must keep {what} finite, got {protocol.lr!r} and a loss of {losses[-1].item()} in "
            f"epoch {epoch + 1}; lower optimizer.lr"
        )
    return mean


def warn_of_divergence(what: str, loss: float, num_classes: int, lr: float) -> None:
    """Warns of a training that ended far worse than guessing, whose loss is the logarithm of the classes.

    Args:
        what: is trained.
        loss: cross-entropy of the training images at the end.
        num_classes: C.
        lr: the learning rate.

    Example:
        >>> warn_of_divergence("the probe", loss=0.3, num_classes=10, lr=0.1)  # nothing to say
    """
    if not loss <= DIVERGED * math.log(num_classes):
        print(
            f"warning: {what} ends with a training loss of {loss:.3g}, where guessing has "
            f"{math.log(num_classes):.3g}: optimizer.lr={lr:g} is too high, the accuracy means nothing",
            file=sys.stderr,
        )
