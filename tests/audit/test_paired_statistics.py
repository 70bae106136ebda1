"""Intervals and p-values against what is known of them."""

import numpy as np
import pytest
import scipy.stats
import torch

from metamask_plugin.audit.statistics import (
    banzhaf_values,
    bootstrap_gain,
    paired_differences,
    per_original,
    rank_correlation,
    reality_check,
    standard_error,
    stratified_halves,
)

GENERATOR = torch.Generator().manual_seed(0)


def coins(shape, probability):
    return torch.rand(shape, generator=GENERATOR) < probability


def test_halves_have_half_of_every_class():
    labels = torch.tensor([0] * 20 + [1] * 7 + [2] * 14)[torch.randperm(41, generator=GENERATOR)]
    halves = [stratified_halves(labels, torch.Generator().manual_seed(seed)) for seed in range(30)]
    for half in halves:
        assert abs(2 * int(half.sum()) - 41) == 1
        for label, count in ((0, 20), (1, 7), (2, 14)):
            assert abs(2 * int(half[labels == label].sum()) - count) <= 1
    # every image is in either
    share = torch.stack(halves).float().mean(0)
    assert share.min() > 0.1
    assert share.max() < 0.9


def test_paired_differences_are_mcnemars():
    with_ = torch.tensor([1] * 80 + [0] * 20, dtype=torch.bool)
    without = torch.stack([with_, with_ ^ (torch.arange(100) < 6), with_ ^ (torch.arange(100) >= 91)])
    found = paired_differences(with_, without)
    assert found.value.tolist() == [0, 6, -9]
    exact = [scipy.stats.binomtest(0, n, 0.5).pvalue for n in (6, 9)]
    assert found.p == pytest.approx([1, *exact])
    assert (found.low <= found.value).all()
    assert (found.value <= found.high).all()
    assert found.high[0] > 0 > found.low[0], "no image differs, and still there is an interval"


def test_intervals_cover_a_known_difference():
    covered = 0
    for _ in range(400):
        with_ = coins(150, 0.8)
        without = torch.where(coins(150, 0.1), ~with_, with_)
        # right to wrong with 0.8 * 0.1, wrong to right with 0.2 * 0.1
        found = paired_differences(with_, without[None])
        covered += found.low[0] <= 6.0 <= found.high[0]
    assert 0.92 < covered / 400 < 0.985


def test_banzhaf_values_are_those_of_a_known_game():
    effect = torch.tensor([0.2, -0.15, 0.0, 0.05])
    masks = torch.rand(2000, 4, generator=GENERATOR) < 0.5
    chance = 0.5 + (masks.float() - 0.5) @ effect
    correct = torch.rand(2000, 300, generator=GENERATOR) < chance[:, None]
    found = banzhaf_values(masks, correct)
    assert found.value == pytest.approx(100 * effect.numpy(), abs=0.6)
    assert (found.low <= 100 * effect.numpy()).all()
    assert (100 * effect.numpy() <= found.high).all()
    assert (found.q < 0.01).tolist() == [True, True, False, True]


def test_a_dimension_that_no_mask_drops_has_no_effect():
    masks = torch.rand(50, 3, generator=GENERATOR) < 0.5
    masks[:, 1] = True
    found = banzhaf_values(masks, coins((50, 30), 0.5))
    assert found.value[1] == pytest.approx(0, abs=1e-9)
    assert np.isfinite([*found.value, *found.p, *found.q]).all()


def test_the_bootstrap_has_the_width_of_the_normal_interval():
    before = coins(800, 0.6)
    after = torch.where(coins(800, 0.2), ~before, before)
    gain = bootstrap_gain(before, after, seed=0)
    difference = 100 * (after.float() - before.float())
    error = float(difference.std()) / 800**0.5
    assert gain.value == pytest.approx(float(difference.mean()), abs=1e-4)
    assert (gain.high - gain.low) == pytest.approx(2 * 1.96 * error, rel=0.06)
    assert gain == bootstrap_gain(before, after, seed=0)


def test_the_reality_check_is_not_fooled_by_the_best_of_many():
    before = coins(300, 0.7)
    after = torch.where(coins((200, 300), 0.1), coins((200, 300), 0.7), before)
    best = int(after.sum(1).argmax())
    assert paired_differences(after[best], before[None]).p[0] < 0.2
    assert reality_check(before, after, seed=0) > 0.2
    after[3] |= coins(300, 0.5)
    assert reality_check(before, after, seed=0) < 0.01


def test_rank_correlation_has_an_interval_and_may_be_undefined():
    x = np.arange(30.0)
    noisy = x + np.random.default_rng(0).normal(0, 8, 30)
    found = rank_correlation(x, noisy)
    assert found.value == pytest.approx(scipy.stats.spearmanr(x, noisy).statistic)
    assert 0 < found.low < found.value < found.high < 1
    assert rank_correlation(x, -x).value == pytest.approx(-1)
    assert np.isnan(rank_correlation(x, np.ones(30)).value)


def renderings(copies=10, count=200, same=0.3):
    """Correctness of two classifiers on ``copies`` images of each original, which mostly fare alike.

    Neither classifier is better: what an original does differently is as often for the one as for the other.
    """
    hard = coins(count, same)
    first, second = (coins(count, 0.5)[None] | coins((copies, count), 0.6) & ~hard for _ in range(2))
    return first.flatten(), second.flatten(), torch.arange(count).repeat(copies)


def test_the_share_of_each_original_is_in_the_order_of_their_numbers():
    correct = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert per_original(correct, None) is correct
    assert per_original(correct, torch.tensor([7, 2, 2, 7])).tolist() == [[0.5, 1.0], [0.5, 0.0]]


def test_the_standard_error_is_over_originals():
    correct, _, originals = renderings()
    shares = correct.view(10, 200).double().mean(0).numpy()
    assert standard_error(correct, originals) == pytest.approx(100 * scipy.stats.sem(shares))
    # images drawn alone would be three times as sure of it as there is reason to
    assert standard_error(correct) == pytest.approx(100 * scipy.stats.sem(correct.double().numpy()))
    assert standard_error(correct) < 0.6 * standard_error(correct, originals)
    drawn = np.random.default_rng(0).integers(200, size=(4000, 200))
    assert 100 * shares[drawn].mean(1).std() == pytest.approx(standard_error(correct, originals), rel=0.05)
    assert np.isnan(standard_error(correct[:1]))


def test_intervals_of_renderings_leave_0_out_as_rarely_as_they_say_over_originals_alone():
    alarms = {"images": [], "originals": [], "bootstrap": []}
    for seed in range(200):
        first, second, originals = renderings()
        pairs = {
            "images": (first, second),
            "originals": tuple(per_original(one, originals) for one in (first, second)),
        }
        for unit, (one, other) in pairs.items():
            found = paired_differences(one, other[None])
            alarms[unit].append(found.p[0] < 0.05)
            assert found.low[0] < found.value[0] < found.high[0]
        gain = bootstrap_gain(*reversed(pairs["originals"]), seed, draws=400)
        assert gain.value == pytest.approx(found.value[0])
        alarms["bootstrap"].append(not gain.low <= 0 <= gain.high)
    rates = {unit: np.mean(found) for unit, found in alarms.items()}
    assert rates["images"] > 0.2
    assert rates["originals"] < 0.11 and rates["bootstrap"] < 0.12, rates


def test_originals_that_do_not_differ_at_all():
    _, _, originals = renderings()
    shares = per_original(torch.ones(2000, dtype=torch.bool), originals)
    found = paired_differences(shares, shares[None])
    assert (found.value[0], found.low[0], found.high[0], found.p[0]) == (0, 0, 0, 1)
