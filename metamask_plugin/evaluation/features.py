"""Features of a whole split, extracted once, and the accuracy of a classifier on them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from metamask_plugin.errors import UserError, check
from metamask_plugin.modules import encoders

Progress = Callable[[int, int | None], None]


class Features(NamedTuple):
    """Features of a split in the order of its images, on the CPU.

    Attributes:
        feats: float32, shape (N, D).
        labels: int64, shape (N,).
    """

    feats: torch.Tensor
    labels: torch.Tensor


class Accuracy(NamedTuple):
    """Top-1 and top-5 accuracy in percent."""

    acc1: float
    acc5: float


def top_hits(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Whether the label is the class of the largest, second largest ... fifth largest score.

    Args:
        scores: (N, C).
        labels: (N,).

    Returns:
        bool (N, min(5, C)), on the scores' device; at most one is True in a row.

    Example:
        >>> scores = torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]])
        >>> top_hits(scores, torch.tensor([1, 1]))
        tensor([[ True, False, False],
                [False,  True, False]])
    """
    return scores.topk(min(5, scores.shape[1]), dim=1).indices == labels[:, None]


def accuracy(hits: torch.Tensor) -> Accuracy:
    """Top-1 and top-5 accuracy of :func:`top_hits`.

    Example:
        >>> accuracy(torch.tensor([[True, False, False], [False, True, False]]))
        Accuracy(acc1=50.0, acc5=100.0)
    """
    return Accuracy(*(100.0 * int(count) / len(hits) for count in (hits[:, 0].sum(), hits.sum())))


def extract_features(
    backbone: nn.Module,
    loader: Iterable[tuple[torch.Tensor, torch.Tensor]],
    device: torch.device | str | None = None,
    bar: str | None = None,
) -> Features:
    """Runs ``backbone`` over ``loader`` in evaluation mode and without gradients.

    The training flags of all submodules, the module's device and the random number generators are
    as before afterwards, so it can be called in the middle of a training.

    Args:
        backbone: from (B, 3, s, s) to (B, D).
        loader: yields normalised images (B, 3, s, s) and labels (B,).
        device: where to compute; by default where the backbone is.
        bar: title of a progress bar on a terminal; None for no bar.

    Returns:
        The features and labels of all images, in the loader's order.

    Raises:
        UserError: when a feature is not finite, or when there are no images.

    Example:
        >>> batches = [(torch.zeros(4, 3, 8, 8), torch.arange(4)), (torch.ones(2, 3, 8, 8), torch.arange(2))]
        >>> features = extract_features(nn.Flatten(), batches)
        >>> features.feats.shape, features.labels.tolist()
        (torch.Size([6, 192]), [0, 1, 2, 3, 0, 1])
    """
    reference = next(backbone.parameters(), torch.empty(()))
    home, dtype = reference.device, reference.dtype  # float32, unless the training has another precision
    device = torch.device(device) if device is not None else home
    feats, labels, bad_images, bad_inputs = [], [], 0, 0
    # iterating over a DataLoader draws its workers' base seed from the global generator
    generators_kept = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with _evaluating(backbone, home, device), generators_kept, torch.no_grad():
        for x, y in tqdm(loader, bar, disable=bar is None or None):  # None: where there is no terminal
            h = backbone(x.to(device, dtype, non_blocking=True)).float()
            if h.ndim != 2:
                raise UserError(
                    f"backbone must return features of shape (N, D), got {tuple(h.shape)}; "
                    "choose an encoder without its classifier that pools its feature map"
                )
            finite = h.isfinite().all(dim=1)
            if not finite.all():
                bad_images += int((~finite).sum())
                bad_inputs += int((~x.isfinite().flatten(1).all(dim=1)).sum())
            feats.append(h.cpu())
            labels.append(y.long().cpu())
    check(len(feats) > 0, "evaluation images", "at least one", 0, "check data.train_path and data.val_path")
    features = Features(torch.cat(feats), torch.cat(labels))
    _refuse_non_finite(bad_images, bad_inputs, len(features.labels))
    return features


def raw_pixels(loader: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> Features:
    """The images themselves as features, D = 3 * s * s: the baseline below every encoder.

    Args:
        loader: yields normalised images (B, 3, s, s) and labels (B,).

    Raises:
        UserError: when a pixel is not finite, or when there are no images.

    Example:
        >>> raw_pixels([(torch.zeros(4, 3, 8, 8), torch.arange(4))]).feats.shape
        torch.Size([4, 192])
    """
    return extract_features(nn.Flatten(), loader)


def feature_std(feats: torch.Tensor) -> float:
    """How far features (N, D) are from collapse, see :mod:`~metamask_plugin.modules.encoders`.

    Example:
        >>> feature_std(torch.ones(4, 3))
        0.0
    """
    return encoders.feature_std(feats).item()


def _refuse_non_finite(bad_images: int, bad_inputs: int, total: int) -> None:
    if not bad_images:
        return
    if bad_inputs:
        cause = f"{bad_inputs} of the input images are not finite themselves; check the data set"
    else:
        cause = (
            "the training has most likely diverged; lower optimizer.lr or method_kwargs.alpha, "
            "or evaluate an earlier checkpoint"
        )
    raise UserError(
        f"features must be finite, got NaN or infinity for {bad_images} of {total} images; {cause}"
    )


@contextmanager
def _evaluating(backbone: nn.Module, home: torch.device, device: torch.device) -> Iterator[None]:
    # flag by flag: a partly frozen network has submodules that were in evaluation mode before
    flags = [(module, module.training) for module in backbone.modules()]
    backbone.eval().to(device)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        backbone.to(home)
