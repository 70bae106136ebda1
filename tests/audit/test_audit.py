"""The audit finds planted confounders, and does not sell selection noise as a gain."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color

from metamask_plugin.audit import audit
from metamask_plugin.audit.figures import ORANGE
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.knn import knn_accuracies, masked_features

DIM, CLASSES, PLANTED = 24, 5, [3, 11, 20]
SMALL = {"rates": (0.1, 0.3), "draws": 40, "banzhaf_masks": 400}


def features(count, seed, noisy=(), shifted=(), redundant=False):
    """Every dimension says as much of the class; noisy ones nothing, shifted ones something else at test.

    Redundant ones are mixtures of a third as many, so that none of them matters much.
    """
    labels = torch.arange(count) % CLASSES
    orders = torch.rand(CLASSES, DIM, generator=torch.Generator().manual_seed(9)).argsort(dim=0)
    generator = torch.Generator().manual_seed(seed)
    feats = orders[labels] - 2.0 + 2.0 * torch.randn(count, DIM, generator=generator)
    if redundant:
        mixing = torch.randn(DIM // 3, DIM, generator=torch.Generator().manual_seed(8))
        feats = feats[:, : DIM // 3] @ mixing + torch.randn(count, DIM, generator=generator)
    for d in noisy:
        feats[:, d] = 9 * torch.randn(count, generator=generator)
    for d in shifted:  # goes with the class in training, and with another class at test
        feats[:, d] = 4 * ((labels + seed % 2) % CLASSES).float() + torch.randn(count, generator=generator)
    return Features(feats, labels)


def run(seed=0, train=0, test=1, count=300, **settings):
    planted = {key: settings.pop(key) for key in ("noisy", "shifted", "redundant") if key in settings}
    train, test = features(count, 2 * train, **planted), features(count, 2 * test + 1, **planted)
    return audit(*train, *test, seed=seed, **{**SMALL, **settings})


@pytest.fixture(scope="module")
def confounded():
    weights = torch.rand(DIM, generator=torch.Generator().manual_seed(1)) * 0.1 + 1
    weights[PLANTED] = 0.2
    return run(noisy=PLANTED, weights=weights)


@pytest.mark.parametrize("kind", ["noisy", "shifted"])
def test_planted_confounders_are_found_exactly_and_dropping_them_gains_on_other_images(kind, confounded):
    result = confounded if kind == "noisy" else run(shifted=PLANTED)
    assert sorted(result.harmful) == PLANTED
    assert set(PLANTED) <= set(result.removal.dimensions)
    assert set(result.removal.order[:3]) == set(PLANTED)
    assert result.removal.held_out_gain.low > 0
    assert any("3 dimensions hurt" in line for line in result.verdict())
    assert "which is a gain" in result.verdict()[-2 if kind == "noisy" else -1]


def test_without_confounders_the_gain_is_selection_noise():
    results = [run(seed=seed, train=seed, test=seed, rates=(0.1,), redundant=True) for seed in range(4)]
    assert not any(result.harmful for result in results)
    removals = [result.removal for result in results]
    assert sum(removal.selection_gain > 0 for removal in removals) >= 3
    for removal in removals:
        assert removal.held_out_gain.low <= 0 <= removal.held_out_gain.high
    # what selection promises is not there on the other half
    promised = np.mean([removal.selection_gain for removal in removals])
    assert promised > 2
    assert np.mean([removal.held_out_gain.value for removal in removals]) < promised / 2
    for masks in (result.random[0] for result in results):
        assert masks.optimism > 1
        assert masks.reality_check > 0.05


def test_effects_are_differences_of_accuracies(confounded):
    train, test = features(300, 0, PLANTED), features(300, 3, PLANTED)
    everything = knn_accuracies(train, test, (20,))[20].acc1
    assert confounded.accuracy["all"] == pytest.approx(everything)
    without = torch.ones(DIM)
    without[3] = 0
    left = knn_accuracies(masked_features(train, without), masked_features(test, without), (20,))[20].acc1
    single = confounded.effects["leave_one_out"]
    assert single.all.value[3] == pytest.approx(everything - left)
    assert (single.selection + single.held_out) / 2 == pytest.approx(single.all.value, abs=1e-6)
    for effect in confounded.effects.values():
        assert (effect.all.low < effect.all.high).all()
        assert (effect.all.p <= effect.all.q + 1e-12).all()


def test_shares_and_gains_are_those_of_the_points(confounded):
    halves = confounded.images
    assert halves == {"all": 300, "selection": 150, "held-out": 150}
    for masks in confounded.random:
        for split, values in masks.accuracy.items():
            assert values.shape == (40,)
            assert masks.above[split] == np.mean(values > confounded.accuracy[split] + 1e-9)
        both = (masks.accuracy["selection"] + masks.accuracy["held-out"]) / 2
        assert both == pytest.approx(masks.accuracy["all"])
        best = masks.accuracy["selection"].argmax()
        gain = masks.accuracy["held-out"][best] - confounded.accuracy["held-out"]
        assert masks.held_out_gain.value == pytest.approx(gain)
        assert masks.optimism == pytest.approx(masks.mean_selection_gain - masks.mean_held_out_gain)
    # masks that hit a planted dimension gain on both halves
    assert confounded.random[0].correlation.low > 0


def test_learned_weights_that_know_the_confounders_agree_with_the_effects(confounded):
    found = confounded.weights
    assert found.below == 3
    assert found.only_above > confounded.accuracy["all"] > found.only_below
    backwards = torch.from_numpy(-confounded.effects["banzhaf"].all.value)
    result = run(noisy=PLANTED, weights=backwards, rates=())
    assert result.weights.banzhaf.value == pytest.approx(-1)
    assert "go against what a dimension is worth" in result.verdict()[-1]
    result = run(noisy=PLANTED, weights=torch.ones(DIM), rates=())
    assert result.weights.only_below is None
    assert "cannot agree" in result.verdict()[-1]


def test_renderings_of_one_original_share_a_half_and_say_no_more_than_one():
    train, test = features(300, 0, noisy=PLANTED), features(300, 3, noisy=PLANTED)
    thrice = Features(test.feats.repeat(3, 1), test.labels.repeat(3))
    alone = audit(*train, *test, **SMALL)
    audited = audit(*train, *thrice, originals=torch.arange(300).repeat(3), **SMALL)
    assert audited.images == {split: 3 * count for split, count in alone.images.items()}
    assert audited.accuracy == pytest.approx(alone.accuracy)
    assert audited.removal.order == alone.removal.order
    assert audited.removal.held_out_gain == pytest.approx(alone.removal.held_out_gain, abs=0.7)
    for name in ("banzhaf", "leave_one_out"):
        one, other = (result.effects[name].all for result in (alone, audited))
        assert np.allclose(one.value, other.value)
        assert other.high - other.low == pytest.approx(one.high - one.low, rel=0.25)
    distinct = audit(*train, *test, originals=torch.arange(300).flip(0), **SMALL)
    assert distinct.to_dict() == alone.to_dict(), "where no two images share an original nothing changes"
    as_images = audit(*train, *thrice, **SMALL).effects["leave_one_out"].all
    assert np.mean(as_images.high - as_images.low) < 0.7 * np.mean(other.high - other.low)


def test_the_result_is_json_and_text(confounded):
    content = json.loads(json.dumps(confounded.to_dict(), allow_nan=False))
    assert content["harmful"] == confounded.harmful
    assert content["effects"]["banzhaf"]["all"]["q"] == confounded.effects["banzhaf"].all.q.tolist()
    assert content["removal"]["held_out_gain"]["low"] == confounded.removal.held_out_gain.low
    assert len(content["verdict"]) == 1 + 1 + 2 + 1 + 1
    assert confounded.summary().splitlines() == content["verdict"]


def test_it_repeats_itself_by_its_seed_and_counts_its_masks():
    calls = []
    small = {"count": 80, "banzhaf_masks": 60, "draws": 5, "weights": torch.rand(DIM)}
    first = run(seed=3, progress=lambda *seen: calls.append(seen), **small)
    assert calls[-1][0] == calls[-1][1]
    assert calls == sorted(calls)
    again = run(seed=3, **small)
    assert first.to_dict() == again.to_dict()
    assert first.to_dict() != run(seed=4, **small).to_dict()


def test_greedy_removal_drops_one_dimension_after_the_other():
    calls = []
    settings = {"metric": "linear", "removal": "greedy", "max_removed": 4, "rates": ()}
    result = run(shifted=PLANTED[:1], progress=lambda *seen: calls.append(seen), **settings)
    assert calls[-1][0] == calls[-1][1]
    removal = result.removal
    assert removal.counts == [0, 1, 2, 3, 4]
    assert removal.order[0] == PLANTED[0]
    assert removal.held_out_gain.low > 0
    # the first step takes what leave-one-out says on the selection half
    assert removal.order[0] == result.effects["leave_one_out"].selection.argmin()


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="test images must be four or more, to be split, got 3"):
        run(count=3)
    for settings, message in (
        ({"metric": "knn"}, "metric must be knn<k> or linear"),
        ({"removal": "best"}, "removal must be one of"),
        ({"weights": torch.ones(3)}, "weights must be one for each of 24 dimensions"),
        (
            {"banzhaf_masks": 10},
            "banzhaf_masks must be more than 25, as the features have 24 dimensions, got 10",
        ),
        ({"max_removed": 0}, "max_removed must be >= 1"),
    ):
        with pytest.raises(UserError, match=message):
            run(count=20, **settings)


def test_one_set_of_arrays_is_split_in_two():
    feats, labels = features(400, 0, noisy=PLANTED)
    result = audit(feats.numpy(), labels.numpy(), **SMALL)
    assert result.images == {"all": 200, "selection": 100, "held-out": 100}
    assert set(result.harmful) <= set(PLANTED) <= set(result.removal.order[:6])
    assert result.to_dict() == audit(feats, labels, **SMALL).to_dict()
    for given, message in (
        ({"originals": torch.arange(400)}, "originals must be given with test_features"),
        ({"test_features": feats}, "test_features and test_labels must be given together"),
    ):
        with pytest.raises(UserError, match=message):
            audit(feats, labels, **given)


def test_the_figure_marks_what_hurts_and_draws_the_numbers(confounded, tmp_path):
    figure = confounded.plot("an encoder")
    values, single, gains, curve = figure.axes
    banzhaf = confounded.effects["banzhaf"].all.value
    harmful = next(line for line in values.lines if line.get_label() == "hurts (3)")
    assert list(harmful.get_xdata()) == [0, 1, 2]
    assert list(harmful.get_ydata()) == sorted(banzhaf[PLANTED])
    assert same_color(harmful.get_color(), ORANGE)
    assert {text.get_text() for text in values.texts} == {str(d) for d in PLANTED}
    drawn = np.concatenate([line.get_ydata() for line in single.lines if line.get_marker() == "o"])
    assert sorted(drawn) == sorted(confounded.effects["leave_one_out"].all.value)
    points = next(line for line in gains.lines if line.get_label() == "30 %")
    held_out = confounded.random[1].accuracy["held-out"] - confounded.accuracy["held-out"]
    assert list(points.get_ydata()) == pytest.approx(list(held_out))
    removal = confounded.removal
    assert [list(line.get_ydata()) for line in curve.lines[:2]] == [removal.selection, removal.held_out]
    assert str(removal.held_out_gain) in curve.get_legend().get_texts()[-1].get_text()
    figure.savefig(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").stat().st_size < 150_000


def test_the_lines_of_the_documentation():
    page = (Path(__file__).parents[2] / "docs" / "studies.md").read_text()
    section = page[page.index("## The confounder audit") :]
    lines = section[section.index("```python\n") + 10 :].partition("```")[0]
    feats, labels = features(120, 0)
    names = {"features": feats.numpy(), "labels": labels.numpy()}
    exec(lines, names)
    assert names["result"].dimensions == DIM
