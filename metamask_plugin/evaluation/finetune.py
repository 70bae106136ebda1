"""Fine-tuning on few labels: the whole encoder and a new linear classifier, as SimCLR does it.

Every encoder is given the same labelled images, whatever its method and the seed of its training, so that
two results differ by the encoder alone. The baseline, training from scratch on these labels, is the same call
with an encoder that was never trained.

[0] Chen et al., *A Simple Framework for Contrastive Learning of Visual Representations*, ICML 2020, B.5.
[1] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022, Table 4.
"""

import copy
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from metamask_plugin.data import ImageSplit, stratified_subset
from metamask_plugin.data.loaders import TrainingLoader
from metamask_plugin.data.registry import FRACTION_SEED
from metamask_plugin.errors import UserError, check
from metamask_plugin.evaluation.features import accuracy, extract_features, top_hits
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.linear import (
    LinearProtocol,
    ProbeResult,
    set_rate,
    train_epoch,
    warn_of_divergence,
)

ALL = -1
"""The fraction that stands for all labels, as in ``data.fraction``."""

# 4096 in [0]; the learning rate follows the batch, and this one fits a ResNet-50 on a single GPU
BATCH_SIZE = 256


@dataclass(frozen=True)
class FineTuneProtocol(LinearProtocol):
    """How encoder and classifier are trained; what is not listed here is as in :class:`LinearProtocol`.

    Attributes:
        lr: learning rate at ``batch_size``. With fewer labelled images than that, the batch is all of them
            and the rate is lowered in proportion.
        batch_size: at least 2, for batch normalisation; an incomplete last batch of an epoch is dropped.
        scheduler: as in :class:`LinearProtocol`, but followed step by step; ``none`` is a constant rate.
        nesterov: of SGD with momentum.
        crop_min_scale: the smallest share of an image's area that a random resized crop keeps.
        horizontal_flip: probability.

    Example:
        >>> protocol = FineTuneProtocol("sgd", lr=0.1, epochs=30, batch_size=32, horizontal_flip=0.0)
        >>> protocol.view["horizontal_flip"], protocol.nesterov
        ({'prob': 0.0}, True)
    """

    nesterov: bool = True
    crop_min_scale: float = 0.08
    horizontal_flip: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        check(self.batch_size >= 2, "optimizer.batch_size", ">= 2 to fine-tune", self.batch_size)

    @property
    def view(self) -> dict:
        """Random resized crop and flip alone, as an entry of solo-learn's ``augmentations``."""
        return {
            "rrc": {"enabled": True, "crop_min_scale": self.crop_min_scale, "crop_max_scale": 1.0},
            "horizontal_flip": {"prob": self.horizontal_flip},
        }


def simclr_protocol(
    fraction: float,
    batch_size: int = BATCH_SIZE,
    crop_min_scale: float = 0.08,
    horizontal_flip: float = 0.5,
) -> FineTuneProtocol:
    """The protocol of [0], which ICL-MSR's Table 4 [1] follows.

    Nesterov momentum 0.9, learning rate 0.05 * batch_size / 256, no weight decay, no warm-up; 60 epochs on
    1 % of the labels, 30 on 10 % and more. The paper names no schedule; its code decays by a cosine, always,
    and its command lets the classifier start at zero, and so does this.

    Args:
        fraction: share of the labels, or -1 for all; below 3 %, nearer to 1 % than to 10 %, the training is
            the longer one.
        batch_size: 4096 in [0].
        crop_min_scale: that of [0] by default.
        horizontal_flip: likewise; 0 where a mirrored image is another thing (digits).

    Example:
        >>> protocol = simclr_protocol(0.01)
        >>> protocol.epochs, protocol.lr
        (60, 0.05)
    """
    epochs = 60 if 0 < fraction < 0.03 else 30
    return FineTuneProtocol(
        "sgd",
        lr=0.05 * batch_size / 256,
        epochs=epochs,
        batch_size=batch_size,
        scheduler="cosine",
        crop_min_scale=crop_min_scale,
        horizontal_flip=horizontal_flip,
    )


def labelled_subset(
    split: ImageSplit,
    fraction: float = ALL,
    subset_seed: int = FRACTION_SEED,
    subset_file: str | Path | None = None,
) -> ImageSplit:
    """The labelled images to fine-tune on: the same share of every class, at least one image of each.

    With the default seed they are those that ``data.fraction`` keeps.

    Args:
        split: all labelled training images.
        fraction: share of them, in (0, 1), or 1 or -1 for all.
        subset_seed: which images are taken is a function of it alone.
        subset_file: a list of file names, one a line, to take instead, such as SimCLR's
            ``imagenet_subsets/1percent.txt``; the fraction and the seed then say nothing.

    Raises:
        UserError: when a class has no image, for a fraction out of range, or a list that does not fit.

    Example:
        >>> from metamask_plugin.data import digits
        >>> train, test = digits(size=16)
        >>> len(train), len(labelled_subset(train, 0.1))
        (1297, 130)
    """
    _require_every_class(split, "check data.train_path")
    if subset_file is not None:
        chosen = _listed(split, subset_file)
        _require_every_class(chosen, "complete data.subset_file")
        return chosen
    number = isinstance(fraction, int | float) and not isinstance(fraction, bool)
    check(number, "data.fraction", "a number between 0 and 1 (or -1 for all images)", fraction)
    if fraction in (ALL, 1):
        return split
    return stratified_subset(split, fraction, subset_seed)


def finetune(
    backbone: nn.Module,
    data: LabelledImages,
    fraction: float = ALL,
    protocol: FineTuneProtocol | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    bar: str | None = None,
    subset_seed: int = FRACTION_SEED,
    subset_file: str | Path | None = None,
) -> ProbeResult:
    """Trains a copy of an encoder with a linear classifier on few labels; tests it after every epoch.

    Batch normalisation is in training mode in training, and uses its running statistics in the tests. The
    encoder that is given, and the global random generators, are as before afterwards.

    Args:
        backbone: from (B, 3, s, s) to (B, D), trained or not. Parameters without gradients stay fixed, but if
            none has any, all are trained.
        data: its training images are the pool that the labelled ones are taken from.
        fraction: share of the training images, see :func:`labelled_subset`.
        protocol: by default :func:`simclr_protocol` for this fraction.
        seed: of the order of the images and of their augmentation; the classifier starts at zero.
        device: where to train; by default where the encoder is.
        bar: title of a progress bar on a terminal; None for no bar.
        subset_seed: see :func:`labelled_subset`.
        subset_file: see :func:`labelled_subset`.

    Raises:
        UserError: for labels that do not do, or when the loss is no longer finite.

    Example:
        >>> from metamask_plugin.modules.encoders import build_encoder
        >>> images = LabelledImages.read({"dataset": "digits", "kwargs": {"size": 16}}, crop_size=16)
        >>> protocol = FineTuneProtocol("adam", lr=1e-3, epochs=1, batch_size=32, horizontal_flip=0.0)
        >>> result = finetune(build_encoder("conv4", 16, width=4), images, 0.1, protocol)
        >>> result.images, result.steps, result.epochs
        (130, 4, 1)
    """
    chosen = labelled_subset(data.images("train"), fraction, subset_seed, subset_file)
    if protocol is None:
        # of a list, what it comes to; of a fraction not, as its classes are rounded to whole images
        protocol = simclr_protocol(len(chosen) / data.sizes["train"] if subset_file else fraction)
    home = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    device = torch.device(device) if device is not None else home
    batch_size = min(protocol.batch_size, len(chosen))
    loader = data.augmented(chosen, protocol.view, batch_size, seed, device)
    accuracies = []
    with _seeded(device, seed), torch.inference_mode(False):
        network = _with_classifier(backbone, data, device)
        optimizer = protocol.build_optimizer(network, nesterov=protocol.nesterov)
        for epoch in tqdm(range(protocol.epochs), bar, disable=bar is None or None):
            batches = _batches(loader, optimizer, protocol, epoch)
            loss = train_epoch(
                network.train(), batches, optimizer, "the loss of fine-tuning", protocol, epoch
            )
            hits = top_hits(*extract_features(network, data.evaluation_loader("test"), device))
            accuracies.append(accuracy(hits))
    warn_of_divergence("fine-tuning", loss, data.num_classes, protocol.lr)
    state = {key: tensor.cpu() for key, tensor in network.state_dict().items()}
    return ProbeResult(tuple(accuracies), hits[:, 0], len(chosen), protocol.epochs * len(loader), state)


def _batches(
    loader: TrainingLoader, optimizer: torch.optim.Optimizer, protocol: FineTuneProtocol, epoch: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Images and labels of an epoch; sets the learning rate of each step."""
    loader.sampler.set_epoch(epoch)
    for step, (_, (x,), y) in enumerate(loader):
        lr = protocol.lr_at(epoch + step / len(loader))
        set_rate(optimizer, lr * loader.batch_size / protocol.batch_size)
        yield x, y


def _require_every_class(split: ImageSplit, remedy: str) -> None:
    counts = torch.bincount(split.labels, minlength=len(split.classes))
    empty = (counts == 0).nonzero().flatten().tolist()
    check(
        not empty,
        "labelled training images",
        "at least one of every class",
        f"none of {len(empty)} classes, the first {split.classes[empty[0]]!r}" if empty else "",
        remedy,
    )


def _listed(split: ImageSplit, subset_file: str | Path) -> ImageSplit:
    paths = getattr(split, "paths", None)
    remedy = "leave it out, or add data.pipeline=torchvision"
    check(
        paths is not None, "data.subset_file", "left out where images lie in memory", str(subset_file), remedy
    )
    try:
        names = Path(subset_file).read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a text"
        raise UserError(
            f"data.subset_file must be a readable list of file names, got {str(subset_file)!r} ({reason})"
        ) from None
    wanted = {name.strip() for name in names if name.strip()}
    rows = [index for index, path in enumerate(paths) if os.path.basename(path) in wanted]
    missing = wanted - {os.path.basename(paths[index]) for index in rows}
    check(
        not missing,
        "data.subset_file",
        "a list of files in data.train_path",
        f"{len(missing)} of {len(wanted)} that are not there, the first {min(missing, default='')}",
        "check data.train_path",
    )
    return split.subset(rows)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Views and dropout draw from the global generators; they are seeded within, and as before afterwards."""
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        # not torch.manual_seed, which would reach generators that are not put back
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


def _with_classifier(backbone: nn.Module, data: LabelledImages, device: torch.device) -> nn.Sequential:
    network = copy.deepcopy(backbone).to(device)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        network.requires_grad_(True)
    x, y = next(iter(data.evaluation_loader("test")))
    dim = extract_features(network, [(x[:2], y[:2])], device).feats.shape[1]
    classifier = nn.Linear(dim, data.num_classes, device=device)
    nn.init.zeros_(classifier.weight)
    nn.init.zeros_(classifier.bias)
    return nn.Sequential(OrderedDict(backbone=network, classifier=classifier))
