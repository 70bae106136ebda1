"""Weighted k-nearest-neighbour classification of frozen features."""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from metamask_plugin.data.remarks import tell
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.features import Accuracy, Features, accuracy, top_hits

DISTANCES = ("cosine", "euclidean")

PAPER_K = 5
"""Neighbours of both papers: MetaMask's release [2] (``--knn_k``) and ICL-MSR's Section 6.2."""

PAPER_TEMPERATURE = 1.0
"""Of their votes: ``--knn_t`` of [2]; ICL-MSR gives none.

[2] Li et al., https://github.com/lionellee9089/MetaMask
"""

TEMPERATURE = 0.07
"""Of the votes for any other k: Wu et al., CVPR 2018, and solo-learn."""

# entries of the test x bank similarity matrix held at once: 64 MB in float32
CHUNK_ENTRIES = 16_000_000

# keeps the weight of a test image that lies in the bank itself finite
EUCLIDEAN_EPS = 1e-5


def vote_temperature(k: int, temperature: float | None = None) -> float:
    """Temperature of the votes of ``k`` neighbours: the given one, else that of the k's own protocol.

    >>> vote_temperature(5), vote_temperature(20), vote_temperature(5, 0.2)
    (1.0, 0.07, 0.2)
    """
    if temperature is not None:
        return temperature
    return PAPER_TEMPERATURE if k == PAPER_K else TEMPERATURE


def within_bank(name: str, k: Sequence[int], bank: int) -> list[int]:
    """The numbers of neighbours that there can be; a warning where one is larger than the bank.

    Args:
        name: the setting as the user writes it.
        k: numbers of neighbours.
        bank: training images.

    Returns:
        ``k`` with the size of the bank in place of what exceeds it, each number once.

    Example:
        >>> within_bank("--k", [5, 20], 1000)
        [5, 20]
    """
    within = list(dict.fromkeys(min(size, bank) for size in k))
    above = [str(size) for size in k if size > bank]
    if above:
        tell(
            f"warning: {name}={','.join(above)} is more than the {bank} training images, all of which vote: "
            f"shown as k = {bank}"
        )
    return within


def knn_hits(
    train: Features,
    test: Features,
    k: Sequence[int] = (5, 20, 200),
    temperature: float | None = None,
    distance: str = "cosine",
    device: torch.device | str | None = None,
) -> dict[int, torch.Tensor]:
    """Classifies by a weighted vote of the nearest training features, for several ``k`` by one search.

    ``score_c = sum over neighbours i of class c of w_i`` with ``w_i = exp(cos_i / temperature)`` (cosine) or
    ``w_i = 1 / (d_i + 1e-5)`` (euclidean). The matrix of distances is never held as a whole: 50,000 x 10,000
    at D = 512 takes 0.3 GB.

    Args:
        train: the bank, (M, D).
        test: (N, D).
        k: numbers of neighbours; one above M is clipped to M, and keeps its own key in the result.
        temperature: of the exponential, by default :func:`vote_temperature`'s; unused if euclidean.
        distance: ``"cosine"`` or ``"euclidean"``.
        device: where to search; by default where the features are.

    Returns:
        For each ``k`` what :func:`~metamask_plugin.evaluation.features.top_hits` finds, bool (N, at most 5),
        on the CPU. A class that none of the neighbours has is never a hit.

    Raises:
        UserError: for features or labels that do not fit, or a setting out of range.

    Example:
        >>> bank = Features(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> test = Features(torch.tensor([[0.9, 0.1, 0.0], [0.1, 0.9, 0.0]]), torch.tensor([0, 2]))
        >>> knn_hits(bank, test, k=(1,))[1]
        tensor([[ True, False, False],
                [False, False, False]])

    [0] Wu et al., *Unsupervised Feature Learning via Non-Parametric Instance Discrimination*, CVPR 2018.
    [1] Caron et al., *Emerging Properties in Self-Supervised Vision Transformers*, ICCV 2021, Appendix F.
    """
    check_settings(k, temperature, distance)
    check_bank(train.feats, train.labels, test.feats, test.labels)
    bank, bank_labels = train.feats.to(device), train.labels.to(device)
    feats, labels = test.feats.to(device), test.labels.to(device)
    num_classes = int(torch.max(bank_labels.max(), labels.max())) + 1
    hits: dict[int, list[torch.Tensor]] = {size: [] for size in k}
    for rows, similarities, indices in _nearest(bank, feats, max(k), distance):
        neighbours, own = bank_labels[indices], labels[rows]
        for size in hits:
            voting = (similarities[:, :size], neighbours[:, :size])
            scores = vote(*voting, num_classes, vote_temperature(size, temperature), distance)
            voted_for = scores.gather(1, own[:, None]) > 0
            hits[size].append((top_hits(scores, own) & voted_for).cpu())
    return {size: torch.cat(parts) for size, parts in hits.items()}


def knn_accuracies(
    train: Features,
    test: Features,
    k: Sequence[int] = (5, 20, 200),
    temperature: float | None = None,
    distance: str = "cosine",
    device: torch.device | str | None = None,
) -> dict[int, Accuracy]:
    """Top-1 and top-5 accuracy in percent for each ``k``; see :func:`knn_hits` for the arguments.

    Example:
        >>> bank = Features(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> knn_accuracies(bank, bank, k=(1, 3))
        {1: Accuracy(acc1=100.0, acc5=100.0), 3: Accuracy(acc1=100.0, acc5=100.0)}
    """
    hits = knn_hits(train, test, k, temperature, distance, device)
    return {size: accuracy(found) for size, found in hits.items()}


def masked_features(features: Features, mask: torch.Tensor) -> Features:
    """``h * M``: features (N, D) times the dimensional mask (D,).

    Raises:
        UserError: when the mask has another number of dimensions.

    Example:
        >>> features = Features(torch.ones(1, 3), torch.tensor([0]))
        >>> masked_features(features, torch.tensor([1.0, 0.0, 0.5])).feats
        tensor([[1.0000, 0.0000, 0.5000]])
    """
    dim = features.feats.shape[1]
    check(mask.shape == (dim,), "mask", f"one weight for each of the {dim} dimensions", tuple(mask.shape))
    return Features(features.feats * mask.to(features.feats), features.labels)


def knn_table(
    train: Features,
    test: Features,
    mask: torch.Tensor | None = None,
    ks: Sequence[int] = (5, 20, 200),
    temperature: float | None = None,
    distance: str = "cosine",
    device: torch.device | str | None = None,
) -> dict[str, float]:
    """Top-1 accuracies by name: ``knn5``, ``knn20``, ... and, with a mask, ``knn5_masked``, ...

    A k above M is named M, the number of neighbours that vote.

    MetaMask's paper evaluates the unmasked features (A.4.7), its release the masked ones: where
    there is a mask we always report both.

    Args:
        train: the bank, (M, D).
        test: (N, D).
        mask: effective weights (D,), or None.
        ks: numbers of neighbours.
        temperature: as in :func:`knn_hits`.
        distance: as in :func:`knn_hits`.
        device: where to search; by default where the features are.

    Returns:
        Accuracies in percent.

    Example:
        >>> bank = Features(torch.eye(3), torch.tensor([0, 1, 2]))
        >>> knn_table(bank, bank, mask=torch.ones(3), ks=(1,))
        {'knn1': 100.0, 'knn1_masked': 100.0}
    """
    ks = list(dict.fromkeys(min(k, len(train.labels)) for k in ks))
    found = knn_accuracies(train, test, ks, temperature, distance, device)
    table = {f"knn{k}": acc1 for k, (acc1, _) in found.items()}
    if mask is not None:
        masked = (masked_features(split, mask) for split in (train, test))
        found = knn_accuracies(*masked, ks, temperature, distance, device)
        table |= {f"knn{k}_masked": acc1 for k, (acc1, _) in found.items()}
    return table


class WeightedKNNClassifier(Metric):
    """The same classifier as a metric, with the interface that solo-learn's ``BaseMethod`` expects.

    Usage: ``knn(train_features=h, train_targets=y)`` and ``knn(test_features=h, test_targets=y)``
    for each batch, then ``acc1, acc5 = knn.compute()``, which also empties the banks.

    solo-learn's own passes ``compute_on_step`` to torchmetrics, which removed it in 0.12; this one
    works from 0.11 to 1.9. Without training or without test features the result is (-1, -1), as there.

    Args:
        k: number of neighbours, clipped to the bank's size.
        T: temperature of the exponential; unused with euclidean distance.
        distance_fx: ``"cosine"`` or ``"euclidean"``.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        UserError: for a setting out of range.

    Example:
        >>> knn = WeightedKNNClassifier(k=1)
        >>> knn(train_features=torch.eye(3), train_targets=torch.arange(3))
        >>> knn(test_features=torch.eye(3), test_targets=torch.tensor([0, 1, 1]))
        >>> knn.compute()
        (66.66666666666667, 66.66666666666667)
    """

    full_state_update = False
    higher_is_better = True
    is_differentiable = False

    def __init__(self, k: int = 20, T: float = 0.07, distance_fx: str = "cosine", **kwargs):
        super().__init__(**kwargs)
        check_settings((k,), T, distance_fx)
        self.k, self.T, self.distance_fx = k, T, distance_fx
        for state in ("train_features", "train_targets", "test_features", "test_targets"):
            self.add_state(state, default=[], dist_reduce_fx="cat", persistent=False)

    def forward(self, *args, **kwargs) -> None:
        # torchmetrics would compute on every batch: a neighbour search for a number nobody reads
        self.update(*args, **kwargs)

    def update(
        self,
        train_features: torch.Tensor | None = None,
        train_targets: torch.Tensor | None = None,
        test_features: torch.Tensor | None = None,
        test_targets: torch.Tensor | None = None,
    ) -> None:
        """Adds a batch: features (B, D) with targets (B,) to the bank, to the test set, or to both.

        Raises:
            UserError: when features come without targets, or with another number of them.
        """
        self._append("train", train_features, train_targets)
        self._append("test", test_features, test_targets)

    def _append(self, split: str, feats: torch.Tensor | None, targets: torch.Tensor | None) -> None:
        found = tuple(None if tensor is None else len(tensor) for tensor in (feats, targets))
        name = f"{split}_features and {split}_targets"
        check(found[0] == found[1], name, "given together and equally many", found)
        if feats is not None:
            getattr(self, f"{split}_features").append(feats.detach().float())
            getattr(self, f"{split}_targets").append(targets.detach().long())

    def compute(self) -> tuple[float, float]:
        """Top-1 and top-5 accuracy in percent; empties the banks."""
        if len(self.train_features) == 0 or len(self.test_features) == 0:
            return -1, -1
        train = Features(dim_zero_cat(self.train_features), dim_zero_cat(self.train_targets))
        test = Features(dim_zero_cat(self.test_features), dim_zero_cat(self.test_targets))
        found = knn_accuracies(train, test, (self.k,), self.T, self.distance_fx)[self.k]
        # BaseMethod never resets its metric, so the next validation epoch would add to this one's
        self.reset()
        return found.acc1, found.acc5


def check_settings(k: Sequence[int], temperature: float | None, distance: str) -> None:
    """Raises a :class:`UserError` for a setting that does not exist or is out of range.

    Example:
        >>> check_settings([5, 20], None, "cosine")
    """
    check(len(k) > 0 and all(size >= 1 for size in k), "k", ">= 1", k if len(k) != 1 else k[0])
    choose("distance", distance, DISTANCES)
    fits = temperature is None or temperature > 0
    check(fits, "temperature", "> 0", temperature, f"{TEMPERATURE} is the usual value")


def check_bank(
    train_feats: torch.Tensor, train_labels: torch.Tensor, test_feats: torch.Tensor, test_labels: torch.Tensor
) -> None:
    """Raises a :class:`UserError` for features or labels that do not fit each other.

    Example:
        >>> check_bank(torch.eye(3), torch.arange(3), torch.ones(1, 3), torch.zeros(1).long())
    """
    check(len(train_feats) > 0, "training features", "at least one", 0)
    dims = (train_feats.shape[1], test_feats.shape[1])
    check(dims[0] == dims[1], "training and test features", "of one dimension", dims)
    for split, feats, labels in (("training", train_feats, train_labels), ("test", test_feats, test_labels)):
        check(len(labels) == len(feats) > 0, f"{split} labels", f"{len(feats)} > 0 in number", len(labels))
        remedy = "leave out unlabelled images"
        check(int(labels.min()) >= 0, f"{split} labels", ">= 0", int(labels.min()), remedy)


def _nearest(
    bank: torch.Tensor, feats: torch.Tensor, k: int, distance: str
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yields, chunk by chunk, the rows, their sorted similarities (B, k) and bank indices (B, k).

    The similarity is the cosine, or the negative euclidean distance.
    """
    if distance == "cosine":
        bank, feats = F.normalize(bank, dim=1), F.normalize(feats, dim=1)
    else:
        # distances ignore a shift, and cdist's |a|^2 + |b|^2 - 2ab loses fewer digits near zero
        centre = bank.mean(dim=0)
        bank, feats = bank - centre, feats - centre
    rows_per_chunk = max(1, CHUNK_ENTRIES // len(bank))
    for start in range(0, len(feats), rows_per_chunk):
        rows = slice(start, start + rows_per_chunk)
        similarity = feats[rows] @ bank.T if distance == "cosine" else -torch.cdist(feats[rows], bank)
        values, indices = similarity.topk(min(k, len(bank)), dim=1)
        yield rows, values, indices


def vote(
    similarities: torch.Tensor,
    neighbour_labels: torch.Tensor,
    num_classes: int,
    temperature: float,
    distance: str,
) -> torch.Tensor:
    """Class scores (N, C) from similarities (N, k), the largest first, and the neighbours' labels (N, k).

    Example:
        >>> vote(torch.tensor([[1.0, 0.9, 0.8]]), torch.tensor([[0, 1, 1]]), 2, 1.0, "cosine")
        tensor([[0.3672, 0.6328]])
    """
    if distance == "cosine":
        # relative to the nearest, which cancels in the normalisation: exp(1 / T) overflows for small T
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
    else:
        weights = 1 / (EUCLIDEAN_EPS - similarities)
    scores = weights.new_zeros(len(weights), num_classes).scatter_add_(1, neighbour_labels, weights)
    return scores / scores.sum(dim=1, keepdim=True)
