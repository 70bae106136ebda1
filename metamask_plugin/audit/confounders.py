"""The confounder audit: which dimensions of an encoder hurt, and what dropping them is worth.

Among many random masks some are above the unmasked accuracy by chance, on the very images that they are
compared on: that alone shows no confounder. The audit therefore chooses on one half of the test images and
counts on the other, gives every effect an interval over images, and corrects for the number of dimensions.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from metamask_plugin.audit import statistics
from metamask_plugin.audit.masks import (
    Array,
    Progress,
    below_average,
    labelled,
    masked_correct,
    random_masks,
)
from metamask_plugin.audit.result import AuditResult, Effects, RandomMasks, Removal, WeightAgreement
from metamask_plugin.errors import check, choose

RATES = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)
REMOVALS = ("banzhaf", "leave_one_out", "greedy")

# how often the best random mask is chosen anew, on another half
RESPLITS = 100

Halves = dict[str, torch.Tensor]
Judge = Callable[[torch.Tensor], torch.Tensor]
"""From masks, bool (R, D), to correctness (R, N) of images or originals."""


def audit(
    features: Array,
    labels: Array,
    test_features: Array | None = None,
    test_labels: Array | None = None,
    metric: str = "knn20",
    *,
    temperature: float = 0.07,
    rates: Sequence[float] = RATES,
    draws: int = 100,
    banzhaf_masks: int | None = None,
    removal: str = "banzhaf",
    max_removed: int | None = None,
    weights: Array | None = None,
    level: float = 0.05,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    originals: torch.Tensor | None = None,
) -> AuditResult:
    """Finds the dimensions of frozen features that hurt, and what is left of the gain on other images.

    The test images are split at random, class by class, into a half for selection and one that is held out.

    - The *effect* of a dimension is accuracy with it minus without it: once from the full set
      (``leave_one_out``) and once as the mean over random sets of the others (``banzhaf``), which sees a
      confounder even where another hides it. Harmful is what is below 0 at the false-discovery rate.
    - *Random masks* of each rate, after MetaMask's Fig. 2: how many are above the unmasked accuracy, and what
      the best on one half gains on the other.
    - *Removal* of the most harmful dimensions: the order and how many come from the selection half, the gain
      is counted on the held-out half.

    Args:
        features: what the classifier learns from, (M, D).
        labels: their classes, integers from 0, (M,).
        test_features: (N, D); intervals are over these images. By default a random half of ``features``,
            class by class, and the classifier learns from the other half alone.
        test_labels: (N,).
        metric: the classifier: ``knn<k>``, e.g. ``knn20``, or ``linear``, a least-squares probe.
        temperature: of the neighbours' votes ``exp(cosine / temperature)``.
        rates: shares of dimensions that random masks drop; those that would drop none or all are left out.
        draws: random masks of each rate.
        banzhaf_masks: random sets for the Banzhaf values; by default 2,000, or 4 D if that is more.
        removal: the order: ``banzhaf``, ``leave_one_out``, or ``greedy``, which asks anew after each
            dimension and takes D times as many masks.
        max_removed: at most so many dimensions are removed; by default D / 2, greedily 16.
        weights: a learned mask (D,), to be compared with the effects.
        level: false-discovery rate, and 1 minus the coverage of the intervals.
        seed: of splits, masks and bootstrap.
        device: where to classify; by default where the features are.
        progress: called with (masks done, masks in all).
        originals: what each test image shows, (N,), as many images of each. Images of one original are
            in the same half, and intervals are over originals.

    Raises:
        UserError: for features that do not fit, or a setting out of range.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.arange(600) % 4
    >>> features = rng.normal(size=(4, 8))[labels] + rng.normal(size=(600, 8))
    >>> features[:, 7] = 16 * rng.normal(size=600)  # says nothing of the class, and decides what is near
    >>> result = audit(features, labels, rates=[0.25], draws=20, banzhaf_masks=500)
    >>> result.harmful
    [7]
    >>> print(result.summary())  # doctest: +ELLIPSIS
    Unmasked knn20: ... % of 300 test images, 8 dimensions.
    1 dimension hurts (false-discovery rate 5 %): 7. 7 help.
    ...
    >>> figure = result.plot("random features")
    """
    train = labelled(features, labels, "training")
    given = (test_features is not None, test_labels is not None)
    check(given[0] == given[1], "test_features and test_labels", "given together", given)
    if test_features is not None and test_labels is not None:
        test = labelled(test_features, test_labels, "test")
    else:
        check(originals is None, "originals", "given with test_features", "no test_features")
        first = statistics.stratified_halves(train[1].cpu(), torch.Generator().manual_seed(seed))
        feats, classes = train
        train, test = ((feats[half], classes[half]) for half in (first, ~first))
    dim = train[0].shape[1]
    check_options(dim, draws, banzhaf_masks, removal)
    check(max_removed is None or max_removed >= 1, "max_removed", ">= 1", max_removed)
    check(0 < level < 1, "level", "between 0 and 1", level, "0.05 is the usual value")
    if weights is not None:
        weights = torch.as_tensor(weights).detach().cpu().double().flatten()
        check(weights.shape == (dim,), "weights", f"one for each of {dim} dimensions", tuple(weights.shape))
    banzhaf_masks = banzhaf_masks if banzhaf_masks is not None else max(2000, 4 * dim)
    most = min(dim - 1, max_removed or (16 if removal == "greedy" else dim // 2))
    rates = [rate for rate in rates if 0 < round(rate * dim) < dim]
    originals = statistics.repeated(originals)
    units, sizes = _units(test[1].cpu(), originals)
    check(len(units) >= 4, "test images", "four or more, to be split", len(units))
    generator = torch.Generator().manual_seed(seed)
    first = statistics.stratified_halves(units, generator)
    halves = {"all": torch.ones_like(first), "selection": first, "held-out": ~first}
    sets = torch.rand(banzhaf_masks, dim, generator=generator) < 0.5
    sets[~sets.any(dim=1)] = True  # nothing can be told from no dimension at all
    masks = [torch.ones(1, dim, dtype=torch.bool), ~torch.eye(dim, dtype=torch.bool), sets]
    masks += [random_masks(dim, rate, draws, generator) for rate in rates]
    done, steps = 0, sum(range(dim - most + 1, dim + 1)) if removal == "greedy" else len(_counts(most)) - 1
    total = sum(map(len, masks)) + steps + (0 if weights is None else 2)

    def judge(masks: torch.Tensor) -> torch.Tensor:
        nonlocal done
        seen = None if progress is None else lambda judged, _: progress(done + judged, total)
        correct = masked_correct(train, test, masks, metric, temperature, device=device, progress=seen)
        done += len(masks)
        return statistics.per_original(correct, originals)

    base, single, of_sets, *of_random = judge(torch.cat(masks)).split(list(map(len, masks)))
    base = base[0]
    alone = _effects(lambda half: statistics.paired_differences(base[half], single[:, half], level), halves)
    banzhaf = _effects(lambda half: statistics.banzhaf_values(sets, of_sets[:, half], level), halves)
    effects, found = {"leave_one_out": alone, "banzhaf": banzhaf}, banzhaf.all
    significant = found.q <= level
    ranked = np.argsort(found.value, kind="stable")
    return AuditResult(
        metric=metric,
        images={split: int(sizes[half].sum()) for split, half in halves.items()},
        dimensions=dim,
        accuracy={split: _percent(base[half]) for split, half in halves.items()},
        effects=effects,
        harmful=[int(d) for d in ranked if significant[d] and found.value[d] < 0],
        helpful=int((significant & (found.value > 0)).sum()),
        random=[
            _random_masks(rate, int((~drawn[0]).sum()), correct, base, halves, units, seed, level)
            for rate, drawn, correct in zip(rates, masks[3:], of_random)
        ],
        removal=_remove(judge, base, halves, effects, removal, most, seed, level),
        weights=None if weights is None else _agreement(judge, weights, effects, level),
        level=level,
        seed=seed,
    )


def check_options(dim: int, draws: int, banzhaf_masks: int | None, removal: str) -> None:
    """Refuses settings that :func:`audit` would refuse for features of ``dim`` dimensions.

    Raises:
        UserError: for a setting out of range.
    """
    choose("removal", removal, REMOVALS)
    check(dim >= 2, "features", "of two or more dimensions", dim)
    check(draws >= 1, "draws", ">= 1", draws)
    expected = f"more than {dim + 1}, as the features have {dim} dimensions"
    check(banzhaf_masks is None or banzhaf_masks > dim + 1, "banzhaf_masks", expected, banzhaf_masks)


def _units(labels: torch.Tensor, originals: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Label and number of images of each unit: of each original, or of each image."""
    if originals is None:
        return labels, torch.ones_like(labels)
    _, originals, sizes = originals.unique(return_inverse=True, return_counts=True)
    return torch.zeros_like(sizes).index_copy(0, originals, labels), sizes


def _percent(correct: torch.Tensor) -> float:
    return 100 * float(correct.double().mean())


def _effects(estimate: Callable[[torch.Tensor], statistics.Estimates], halves: Halves) -> Effects:
    found = {split: estimate(half) for split, half in halves.items()}
    return Effects(found["all"], found["selection"].value, found["held-out"].value)


def _random_masks(
    rate: float,
    dropped: int,
    correct: torch.Tensor,
    base: torch.Tensor,
    halves: Halves,
    units: torch.Tensor,
    seed: int,
    level: float,
) -> RandomMasks:
    accuracy = {split: 100 * correct[:, half].double().mean(dim=1).numpy() for split, half in halves.items()}
    gain = {split: values - _percent(base[halves[split]]) for split, values in accuracy.items()}
    best = int(gain["selection"].argmax())
    held_out = halves["held-out"]
    selected, kept = _resplit_gains(correct, base, units, seed)
    return RandomMasks(
        rate=rate,
        dropped=dropped,
        accuracy=accuracy,
        above={split: float((values > 1e-9).mean()) for split, values in gain.items()},
        best=best,
        selection_gain=float(gain["selection"][best]),
        held_out_gain=statistics.bootstrap_gain(base[held_out], correct[best, held_out], seed, level=level),
        optimism=selected - kept,
        mean_selection_gain=selected,
        mean_held_out_gain=kept,
        correlation=statistics.rank_correlation(gain["selection"], gain["held-out"], level),
        reality_check=statistics.reality_check(base, correct, seed),
    )


def _resplit_gains(
    correct: torch.Tensor, base: torch.Tensor, units: torch.Tensor, seed: int
) -> tuple[float, float]:
    """Mean gain of the best mask on the half that chose it, and on the other, over random splits."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.stack([statistics.stratified_halves(units, generator) for _ in range(RESPLITS)]).double()
    difference = correct.double() - base.double()
    selection = difference @ (first / first.sum(dim=1, keepdim=True)).T
    held_out = difference @ ((1 - first) / (1 - first).sum(dim=1, keepdim=True)).T
    best = selection.argmax(dim=0, keepdim=True)
    chosen, kept = (100 * float(gains.gather(0, best).mean()) for gains in (selection, held_out))
    return chosen, kept


def _remove(
    judge: Judge,
    base: torch.Tensor,
    halves: Halves,
    effects: dict[str, Effects],
    method: str,
    most: int,
    seed: int,
    level: float,
) -> Removal:
    selection, held_out = halves["selection"], halves["held-out"]
    dim = len(effects["banzhaf"].selection)
    if method == "greedy":
        order, counts, correct = _greedy(judge, dim, most, selection)
    else:
        order = np.argsort(effects[method].selection, kind="stable")[:most].tolist()
        counts = _counts(most)
        masks = torch.ones(len(counts) - 1, dim, dtype=torch.bool)
        for mask, count in zip(masks, counts[1:]):
            mask[order[:count]] = False
        correct = judge(masks)
    correct = torch.cat([base[None], correct])
    accuracies = [(100 * correct[:, half].double().mean(dim=1)).tolist() for half in (selection, held_out)]
    chosen = int(np.argmax(accuracies[0]))
    return Removal(
        method=method,
        order=order,
        counts=counts,
        selection=accuracies[0],
        held_out=accuracies[1],
        chosen=counts[chosen],
        selection_gain=accuracies[0][chosen] - accuracies[0][0],
        held_out_gain=statistics.bootstrap_gain(base[held_out], correct[chosen, held_out], seed, level=level),
    )


def _greedy(
    judge: Judge, dim: int, most: int, selection: torch.Tensor
) -> tuple[list[int], list[int], torch.Tensor]:
    order, outcomes, mask = [], [], torch.ones(dim, dtype=torch.bool)
    for _ in range(most):
        candidates = mask.nonzero().flatten()
        tried = mask.repeat(len(candidates), 1)
        tried[torch.arange(len(candidates)), candidates] = False
        correct = judge(tried)
        best = int(correct[:, selection].sum(dim=1).argmax())
        order.append(int(candidates[best]))
        outcomes.append(correct[best])
        mask[candidates[best]] = False
    return order, list(range(most + 1)), torch.stack(outcomes)


def _counts(most: int) -> list[int]:
    """From 0 to ``most``, all of the small numbers and ever fewer of the large."""
    return sorted({0, *range(1, min(most, 16) + 1), *np.geomspace(1, most, 40).round().astype(int).tolist()})


def _agreement(
    judge: Judge, weights: torch.Tensor, effects: dict[str, Effects], level: float
) -> WeightAgreement:
    below = below_average(weights)
    # equal weights have none below their mean
    alone = [_percent(one) for one in judge(torch.stack([~below, below]))] if below.any() else [None, None]
    agreement = {
        name: statistics.rank_correlation(weights.numpy(), effect.all.value, level)
        for name, effect in effects.items()
    }
    return WeightAgreement(**agreement, below=int(below.sum()), only_above=alone[0], only_below=alone[1])
