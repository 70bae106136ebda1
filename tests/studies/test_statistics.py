"""Means, intervals and paired differences against SciPy's and numbers made by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from metamask_plugin.errors import UserError
from metamask_plugin.studies.statistics import columns_of, paired, summarise


def row(value, seed=5, metric="knn20", checkpoint="last", **columns):
    return {**columns, "seed": seed, "checkpoint": checkpoint, "metric": metric, "value": value}


def rows_of(values, **columns):
    return [row(value, seed=seed, **columns) for seed, value in enumerate(values)]


def test_the_interval_is_students():
    values = [50.0, 53.0, 51.5, 58.0]
    (entry,) = summarise(rows_of(values, arm="a"), ["arm"])
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert entry["n"] == 4 and entry["values"] == dict(enumerate(values))
    assert (entry["mean"], entry["low"], entry["high"]) == pytest.approx((53.125, low, high))
    assert entry["std"] == pytest.approx(np.std(values, ddof=1))


def test_three_seeds_by_hand():
    (entry,) = summarise(rows_of([1.0, 2.0, 3.0], arm="a"), ["arm"])
    assert entry["high"] - 2 == pytest.approx(4.302653 / math.sqrt(3), abs=1e-5)


def test_one_seed_has_no_interval():
    (entry,) = summarise([row(50.0, arm="a")], ["arm"])
    assert (entry["n"], entry["mean"], entry["low"], entry["high"], entry["std"]) == (1, 50, None, None, None)


def test_every_other_column_makes_an_entry_in_the_order_of_appearance():
    rows = [
        row(1.0, arm="b", rate=0.5),
        row(2.0, arm="a", rate=0.5),
        row(3.0, arm="a", rate=0.1),
        row(4.0, arm="a", rate=0.5, checkpoint="best"),
        row(5.0, arm="a", metric="linear"),
        row(9.0, arm="b", rate=0.5, seed=6),
    ]
    entries = summarise(rows, ["arm"])
    assert [entry["mean"] for entry in entries] == [5, 2, 3, 4, 5]
    assert [entry.get("rate") for entry in entries] == [0.5, 0.5, 0.1, 0.5, None]
    assert list(entries[0])[:4] == ["arm", "checkpoint", "metric", "rate"]
    assert columns_of(entries) == ["arm", "checkpoint", "metric", "rate"]


def test_draws_of_a_seed_count_once():
    rows = [
        row(value, seed=seed, draw=d)
        for seed, pair in ((5, (1, 3)), (6, (5, 7)))
        for d, value in enumerate(pair)
    ]
    (entry,) = summarise(rows, [])
    assert entry["n"] == 2 and entry["values"] == {5: 2, 6: 6}


def test_what_is_not_finite_is_no_measurement():
    none, some = summarise(
        [
            row(None, arm="a"),
            row(math.nan, seed=6, arm="a"),
            row(1.0, arm="b"),
            row(math.inf, seed=6, arm="b"),
        ],
        ["arm"],
    )
    assert (none["n"], none["mean"], none["values"]) == (0, None, {})
    assert (some["n"], some["mean"]) == (1, 1)


@pytest.mark.parametrize("function", [summarise, lambda rows, factors: paired(rows, factors, {"arm": "a"})])
def test_a_duplicate_is_one_line(function):
    with pytest.raises(
        UserError, match="one for each combination and seed, got 'a, last, knn20, seed 5, twice'"
    ):
        function([row(1.0, arm="a"), row(2.0, arm="a")], ["arm"])


def test_differences_are_paired_by_seed():
    base, ours = [50.0, 60.0, 70.0, 40.0], [51.0, 61.5, 71.2, 41.1]
    rows = [*rows_of(base, arm="SimCLR"), *rows_of(ours, arm="MetaMask")]
    (entry,) = paired(rows, ["arm"], {"arm": "SimCLR"})
    test = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert entry["arm"] == "MetaMask" and entry["n"] == 4 and entry["left_out"] == 0
    assert entry["mean"] == pytest.approx(1.2)
    assert (entry["low"], entry["high"]) == pytest.approx((test.low, test.high))
    assert entry["outside"] is True
    a, b = summarise(rows, ["arm"])
    assert a["high"] > b["low"], "unpaired, the intervals overlap"


def differing(metric="knn20", checkpoint="last", **values):
    """Rows of a baseline of 0 and of arms with these values."""
    zero = {"base": [0.0] * max(map(len, values.values()))}
    return [
        row(value, seed=seed, metric=metric, checkpoint=checkpoint, arm=arm)
        for arm, of_seeds in (zero | values).items()
        for seed, value in enumerate(of_seeds)
    ]


def test_p_is_the_paired_t_tests_and_holms_by_hand():
    values = {"a": [1.0, 1.4, 2.0], "b": [-1.0, 0.0, 1.7], "c": [3.0, 3.2, 3.6], "d": [0.5, 0.9, 1.6]}
    entries = {entry["arm"]: entry for entry in paired(differing(**values), ["arm"], {"arm": "base"})}
    p = {arm: stats.ttest_1samp(of_seeds, 0).pvalue for arm, of_seeds in values.items()}
    assert {arm: entry["p"] for arm, entry in entries.items()} == pytest.approx(p)
    assert p["c"] < p["a"] < 0.05 < p["d"] < p["b"]
    # from the smallest: four comparisons, three, two, one
    by_hand = {"c": 4 * p["c"], "a": 3 * p["a"], "d": max(3 * p["a"], 2 * p["d"]), "b": p["b"]}
    assert {arm: entry["p_holm"] for arm, entry in entries.items()} == pytest.approx(by_hand)
    assert {arm for arm, entry in entries.items() if entry["outside"]} == {"a", "c"}
    assert {arm for arm, entry in entries.items() if entry["clear"]} == {"c"}


def test_a_corrected_p_is_never_below_that_of_a_smaller_p():
    alike = paired(differing(a=[1.0, 1.4, 2.0], b=[1.0, 1.4, 2.0]), ["arm"], {"arm": "base"})
    assert alike[0]["p_holm"] == alike[1]["p_holm"] == pytest.approx(2 * alike[0]["p"])


def test_comparisons_are_those_of_a_metric_and_checkpoint_at_all_levels():
    one = differing(a=[1.0, 1.4, 2.0])
    other = [{**row, "dataset": "B"} for row in one]
    best, linear = (
        differing(a=[1.0, 1.4, 2.0], checkpoint="best"),
        differing(a=[1.0, 1.4, 2.0], metric="linear"),
    )
    rows = [*({**row, "dataset": "A"} for row in one), *other, *best, *linear]
    entries = paired(rows, ["dataset", "arm"], {"arm": "base"})
    factor = [entry["p_holm"] / entry["p"] for entry in entries]
    assert factor == pytest.approx([2, 2, 1, 1])
    assert [entry["clear"] for entry in entries] == [False, False, True, True]


@pytest.mark.parametrize(("n", "errors"), [(3, 5.653), (5, 3.761), (10, 3.150)])
def test_what_is_resolvable_is_found_four_times_in_five(n, errors):
    """By drawing: experiments of n seeds whose true difference is the one that is called resolvable."""
    values = np.arange(n) * 1.0
    (entry,) = paired(differing(a=list(values)), ["arm"], {"arm": "base"})
    std = values.std(ddof=1)
    assert entry["resolvable"] == pytest.approx(errors * std / math.sqrt(n), rel=1e-3)
    drawn = np.random.default_rng(0).normal(entry["resolvable"], std, (20_000, n))
    found = (stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05).mean()
    assert found == pytest.approx(0.8, abs=4 * 0.4 / 20_000**0.5)


def test_seeds_that_all_agree():
    same, apart = paired(differing(a=[0.0, 0.0], b=[1.5, 1.5]), ["arm"], {"arm": "base"})
    assert (same["p"], same["p_holm"], same["clear"], same["resolvable"]) == (1, 1, False, 0)
    assert (apart["p"], apart["p_holm"], apart["clear"], apart["resolvable"]) == (0, 0, True, 0)


def test_one_seed_tests_nothing():
    (entry,) = paired(differing(a=[1.0]), ["arm"], {"arm": "base"})
    keys = ("outside", "p", "p_holm", "clear", "resolvable")
    assert [entry[key] for key in keys] == [None] * 5 and entry["left_out"] == 0


def test_0_inside_and_below():
    rows = [
        *rows_of([1.0, 2.0, 3.0], arm="a"),
        *rows_of([2.0, 1.0, 3.5], arm="b"),
        *rows_of([0, 1, 2.1], arm="c"),
    ]
    inside, below = paired(rows, ["arm"], {"arm": "a"})
    assert inside["outside"] is False and inside["low"] < 0 < inside["high"]
    assert below["outside"] is True and below["high"] < 0


def test_other_factors_and_columns_are_matched_and_lone_seeds_are_counted():
    rows = []
    for dataset, shift in (("A", 0.0), ("B", 20.0)):
        for region in ("full", "background"):
            kind = {"dataset": dataset, "tested on": region}
            rows += [row(10.0 + shift + s, seed=s, arm="x", **kind) for s in (1, 2, 3)]
            rows += [row(11.0 + shift + s, seed=s, arm="y", **kind) for s in (2, 3, 4, 5)]
    entries = paired(rows, ["dataset", "arm"], {"arm": "x"})
    assert [(e["dataset"], e["tested on"]) for e in entries] == [
        ("A", "full"),
        ("A", "background"),
        ("B", "full"),
        ("B", "background"),
    ]
    for entry in entries:
        assert (entry["n"], entry["left_out"], entry["mean"]) == (2, 3, 1)
        assert entry["values"] == {2: 1, 3: 1}


def test_a_baseline_of_two_factors_compares_everything_with_one_cell():
    rows = [row(float(i), arm=arm, k=k) for i, (arm, k) in enumerate((a, k) for a in "ab" for k in (1, 2))]
    entries = paired(rows, ["arm", "k"], {"arm": "a", "k": 1})
    assert [(e["arm"], e["k"], e["mean"], e["outside"]) for e in entries] == [
        ("a", 2, 1, None),
        ("b", 1, 2, None),
        ("b", 2, 3, None),
    ]


def test_a_baseline_that_has_not_run_yet_leaves_nothing_to_compare():
    (entry,) = paired(rows_of([1.0, 2.0], arm="b"), ["arm"], {"arm": "a"})
    assert (entry["n"], entry["mean"], entry["outside"], entry["left_out"]) == (0, None, None, 2)


def test_a_baseline_of_no_factor_is_one_line():
    with pytest.raises(UserError, match="baseline must be one of arm, got 'arms'; did you mean 'arm'"):
        paired([], ["arm"], {"arms": "a"})
    with pytest.raises(UserError, match="baseline must be a level by factor"):
        paired([], ["arm"], {})
