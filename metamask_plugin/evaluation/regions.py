"""How much of an encoder's accuracy is foreground, and how much background, after ICL-MSR's Figs. 1 and 4.

[0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from metamask_plugin.data.regions import FORMS, REGIONS
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.features import Features, extract_features
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


class RegionData(Protocol):
    """Loaders in a fixed order, split ``"train"`` or ``"test"``, of the images or of one region of them."""

    def evaluation_loader(
        self, split: str, batch_size: int = 256, region: str = "full", form: str = "fill"
    ) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
        """Iterates over normalised images (B, 3, s, s) and labels (B,)."""


def region_accuracies(
    backbone: nn.Module,
    data: RegionData,
    trained_on: str = "full",
    fit_on: str = "trained",
    k: int = 5,
    temperature: float | None = None,
    protocol: str | LinearProtocol | None = "paper",
    form: str = "fill",
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
        data: gives the two splits, by region.
        trained_on: the region that the encoder was pretrained on.
        fit_on: whether the neighbours and the probe are those of training images of the region
            ``"trained"`` on, for all tests, or of the region that is ``"tested"``.
        k: number of neighbours.
        temperature: of the votes; by default :func:`~metamask_plugin.evaluation.knn.vote_temperature`'s.
        protocol: of the linear probe, see :func:`~metamask_plugin.evaluation.linear.linear_probe`; None
            leaves the probe out.
        form: how a foreground is shown, see :func:`~metamask_plugin.data.regions.region_of`.
        seed: of the probe.
        device: where to compute; by default where the backbone is.

    Returns:
        A row for each of :data:`~metamask_plugin.data.regions.REGIONS`: ``tested on``, ``knn<k>`` and
        ``linear`` (last epoch). Accuracies in percent.

    Raises:
        UserError: for an unknown region or option, or features that are not finite.
    """
    choose("trained_on", trained_on, REGIONS)
    choose("fit_on", fit_on, FIT_ON)
    choose("form", form, FORMS)

    def features(split: str, region: str) -> Features:
        return extract_features(backbone, data.evaluation_loader(split, region=region, form=form), device)

    def rows(fitted: str, tested: Sequence[str]) -> list[dict[str, Any]]:
        train = features("train", fitted)
        tests = {region: features("test", region) for region in tested}
        table = [
            {"tested on": region, **knn_table(train, test, None, (k,), temperature, device=device)}
            for region, test in tests.items()
        ]
        if protocol is not None:
            head = _fitted_head(train, tests[fitted], protocol, seed, device)
            for row in table:
                row["linear"] = _accuracy(head, tests[row["tested on"]])
        return table

    if fit_on == "trained":
        return rows(trained_on, REGIONS)
    # one region after the other: the features of all six would be gigabytes for a large data set
    return [row for region in REGIONS for row in rows(region, [region])]


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
    check(
        len(set(seeds)) == len(seeds),
        f"runs {first['name']!r} trained on {first['trained on']} images",
        "of different seeds",
        seeds,
        "give a run once, and runs that differ otherwise names of their own",
    )
    summary = {key: first[key] for key in (*GROUP, "setting") if key in first}
    summary["n"] = len(runs)
    columns = dict.fromkeys(key for row in runs for key, value in row.items() if isinstance(value, float))
    for column in columns:
        values = [row[column] for row in runs if row.get(column) is not None]
        summary[column] = statistics.fmean(values)
        summary[f"{column}_std"] = statistics.stdev(values) if len(values) > 1 else None
    return summary


def _fitted_head(
    train: Features,
    test: Features,
    protocol: str | LinearProtocol,
    seed: int,
    device: torch.device | str | None,
) -> nn.Module:
    num_classes = int(max(train.labels.max(), test.labels.max())) + 1
    result = linear_probe(train, test, num_classes, protocol, seed=seed, device=device)
    scaling = (PROTOCOLS[protocol] if isinstance(protocol, str) else protocol).scaling
    head = build_head("linear", train.feats.shape[1], num_classes, scaling)
    head.load_state_dict(result.state_dict)
    return head.eval()


def _accuracy(head: nn.Module, test: Features) -> float:
    with torch.no_grad():
        predicted = head(test.feats).argmax(dim=1)
    return 100.0 * int((predicted == test.labels).sum()) / len(test.labels)
