"""Tests encoders on full images, foregrounds and backgrounds, after ICL-MSR's Figs. 1 and 4.

[0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from metamask_plugin.data.regions import REGIONS
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.features import Features, accuracy, extract_features, top_hits
from metamask_plugin.evaluation.knn import knn_table
from metamask_plugin.evaluation.linear import PROTOCOLS, LinearProtocol, build_head, linear_probe

FIT_ON = ("trained", "tested")

SETTINGS = {
    ("full", "full"): 1,
    ("full", "foreground"): 2,
    ("foreground", "foreground"): 3,
    ("foreground", "full"): 4,
}
"""The paper's number for (what the encoder was pretrained on, what it is tested on)."""

GROUP = ("name", "trained on", "tested on")


def region_accuracies(
    backbone: nn.Module,
    images: Callable[[str, str], Iterable[tuple[torch.Tensor, torch.Tensor]]],
    trained_on: str = "full",
    fit_on: str = "trained",
    k: int = 5,
    temperature: float | None = None,
    protocol: str | LinearProtocol | None = "paper",
    seed: int = 0,
    device: torch.device | str | None = None,
) -> list[dict[str, Any]]:
    """Tests one encoder on full images, on their foregrounds and on their backgrounds.

    The paper does not say which images its classifier learns from. ``fit_on="trained"`` keeps to one
    classifier, so that only the test images change: in its setting 2 one that learnt from full images is
    asked about foregrounds. ``fit_on="tested"`` asks what a classifier could still find in the features of
    that region.

    Args:
        backbone: from (B, 3, s, s) to (B, D).
        images: from ``"train"`` or ``"test"``, and one of :data:`~metamask_plugin.data.regions.REGIONS`, to
            batches of normalised images (B, 3, s, s) and labels (B,).
        trained_on: the region that the encoder was pretrained on.
        fit_on: whether the neighbours and the probe are those of training images of the region
            ``"trained"`` on, for all tests, or of the region that is ``"tested"``.
        k: number of neighbours.
        temperature: of the votes; by default :func:`~metamask_plugin.evaluation.knn.vote_temperature`'s.
        protocol: of the linear probe, see :func:`~metamask_plugin.evaluation.linear.linear_probe`; None
            leaves the probe out.
        seed: of the probe.
        device: where to compute; by default where the backbone is.

    Returns:
        A row for each region: ``tested on``, ``knn<k>`` and ``linear`` (last epoch). Accuracies in percent.

    Raises:
        UserError: for an unknown region or option, or features that are not finite.
    """
    choose("trained_on", trained_on, REGIONS)
    choose("fit_on", fit_on, FIT_ON)
    # one region after the other: the features of all six would be gigabytes for a large data set
    fitted = {trained_on: REGIONS} if fit_on == "trained" else {region: (region,) for region in REGIONS}
    rows = []
    for fitted_on, tested in fitted.items():
        train = extract_features(backbone, images("train", fitted_on), device)
        tests = {region: extract_features(backbone, images("test", region), device) for region in tested}
        head = None if protocol is None else _head(train, tests[fitted_on], protocol, seed, device)
        for region, test in tests.items():
            row = {"tested on": region, **knn_table(train, test, None, (k,), temperature, device=device)}
            if head is not None:
                row["linear"] = _accuracy(head, test)
            rows.append(row)
    return rows


def summarise_seeds(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Mean and sample standard deviation over runs that differ by their seed.

    Args:
        rows: with ``name``, ``trained on``, ``tested on``, ``seed``, maybe ``setting``, and accuracies,
            which are the columns of floats.

    Returns:
        A row for each (name, trained on, tested on), in the order in which they first appear: ``n`` is
        the number of runs, ``<accuracy>`` the mean, and ``<accuracy>_std`` the standard deviation,
        which is None for one run.

    Raises:
        UserError: when a seed appears twice in a group, as those runs differ by something else.
    """
    groups: dict[tuple, list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in GROUP), []).append(row)
    return [_summary(runs) for runs in groups.values()]


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    first, seeds = runs[0], [row.get("seed") for row in runs]
    name = f"runs {first['name']!r} trained on {first['trained on']} images"
    remedy = "give a run once, and runs that differ otherwise names of their own"
    check(len(set(seeds)) == len(seeds), name, "of different seeds", seeds, remedy)
    summary = {key: first[key] for key in (*GROUP, "setting") if key in first}
    summary["n"] = len(runs)
    columns = dict.fromkeys(key for row in runs for key, value in row.items() if isinstance(value, float))
    for column in columns:
        values = [row[column] for row in runs if row.get(column) is not None]
        summary[column] = statistics.fmean(values)
        summary[f"{column}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return summary


def _head(
    train: Features,
    test: Features,
    protocol: str | LinearProtocol,
    seed: int,
    device: torch.device | str | None,
) -> nn.Module:
    """A linear classifier that learnt from ``train``; it takes the features as extracted."""
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    result = linear_probe(train, test, num_classes, protocol, seed=seed, device=device)
    scaling = (PROTOCOLS[protocol] if isinstance(protocol, str) else protocol).scaling
    head = build_head("linear", train.feats.shape[1], num_classes, scaling)
    head.load_state_dict(result.state_dict)
    return head.eval()


@torch.no_grad()
def _accuracy(head: nn.Module, test: Features) -> float:
    return accuracy(top_hits(head(test.feats), test.labels)).acc1
