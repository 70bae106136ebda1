"""Masked classifiers against the loop over masks, and scikit-learn's ridge regression."""

import pytest
import torch
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.preprocessing import StandardScaler

from metamask_plugin.audit import below_average, masked_correct, masks, random_masks
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.knn import knn_hits, masked_features

DIM, CLASSES = 40, 4


def clusters(count, seed, scale=1.0):
    centres = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return Features((centres[labels] + 3 * torch.randn(count, DIM, generator=generator)) * scale, labels)


TRAIN, TEST = clusters(230, 0), clusters(90, 1)


def some_masks(seed=0):
    generator = torch.Generator().manual_seed(seed)
    equal = [random_masks(DIM, rate, 4, generator) for rate in (0.0, 0.05, 0.5, 0.95)]
    mixed = torch.rand(9, DIM, generator=generator) < torch.rand(9, 1, generator=generator)
    mixed[:, 7] = True
    return torch.cat([*equal, mixed])[torch.randperm(25, generator=generator)]


def knn_loop(train, test, drawn, k):
    outcomes = []
    for mask in drawn:
        bank, feats = masked_features(train, mask), masked_features(test, mask)
        outcomes.append(knn_hits(bank, feats, (k,), 0.07)[k][:, 0])
    return torch.stack(outcomes)


def test_random_masks_drop_exactly_the_rate_and_only_from_among():
    for rate, dropped in ((0.0, 0), (0.05, 2), (0.5, 20), (0.99, 40), (1.0, 40)):
        drawn = random_masks(DIM, rate, 30, torch.Generator().manual_seed(1))
        assert drawn.dtype == torch.bool
        assert ((~drawn).sum(1) == dropped).all()
    among = torch.zeros(DIM, dtype=torch.bool)
    among[[3, 5, 6, 30]] = True
    drawn = random_masks(DIM, 0.5, 200, torch.Generator().manual_seed(1), among)
    assert ((~drawn).sum(1) == 2).all()
    assert drawn[:, ~among].all()
    # each of the four is dropped in half of the masks, and every pair of them occurs
    assert ((~drawn)[:, among].float().mean(0) - 0.5).abs().max() < 0.12
    assert len(drawn.unique(dim=0)) == 6
    by_number = random_masks(DIM, 0.5, 200, torch.Generator().manual_seed(1), torch.tensor([3, 5, 6, 30]))
    assert torch.equal(drawn, by_number)
    assert not torch.equal(drawn, random_masks(DIM, 0.5, 200, torch.Generator().manual_seed(5), among))


@pytest.mark.parametrize(
    ("rate", "among", "message"),
    [
        (5, None, "mask rate must be from 0 to 1, got 5; 5 % is 0.05"),
        (0.5, torch.ones(3, dtype=torch.bool), "among must be one truth value for each of 40"),
        (0.5, torch.tensor([1, 40]), "among must be different dimensions below 40"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(rate, among, message):
    with pytest.raises(UserError, match=message):
        random_masks(DIM, rate, 1, among=among)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"masks": torch.ones(2, DIM)}, r"masks must be bool of shape \(R, 40\)"),
        ({"metric": "svm"}, "metric must be knn<k> or linear"),
        ({"metric": "knn0"}, "metric must be knn<k> or linear"),
        ({"ridge": 0}, "ridge must be > 0"),
        ({"temperature": 0}, "temperature must be > 0"),
        ({"train": (TRAIN.feats, TEST.labels)}, r"training labels must be one for each of 230.*got \(90,\)"),
        ({"test": (TEST.feats[:, 1:], TEST.labels)}, "features must be of the same dimension"),
        ({"test": (TEST.feats / 0, TEST.labels)}, "test features must be finite"),
        ({"test": (TEST.feats, TEST.labels - 1)}, "test labels must be >= 0"),
    ],
)
def test_settings_and_features_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        masked_correct(**{"train": TRAIN, "test": TEST, "masks": some_masks(), **given})


@pytest.mark.parametrize("metric", ["knn20", "linear"])
def test_a_mask_that_drops_everything_is_refused_in_one_line(metric):
    drawn = some_masks()
    drawn[[2, 5]] = False
    with pytest.raises(UserError, match="got 2 of 25 that drop all 40; lower the mask rate") as caught:
        masked_correct(TRAIN, TEST, drawn, metric)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("k", [1, 5, 20, 200, 500])
def test_knn_equals_the_loop_over_masks(k):
    found = masked_correct(TRAIN, TEST, some_masks(), f"knn{k}")
    assert torch.equal(found, knn_loop(TRAIN, TEST, some_masks(), k))
    assert 0.3 < found.float().mean() < 0.9, "neither trivial nor hopeless"


def test_arrays_and_small_chunks_do_not_change_the_outcome(monkeypatch):
    test = Features(TEST.feats[:20], TEST.labels[:20])
    expected = knn_loop(TRAIN, test, some_masks(3), 3)
    for entries in (1, 7 * 240, 10**6):
        monkeypatch.setattr(masks, "CHUNK_ENTRIES", entries)
        assert torch.equal(masked_correct(TRAIN, test, some_masks(3), "knn3"), expected)
    arrays = [tuple(tensor.numpy() for tensor in split) for split in (TRAIN, test)]
    assert torch.equal(masked_correct(*arrays, some_masks(3), "knn3"), expected)


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_dropping_dimensions_of_huge_scale_loses_no_digits(rate):
    # after dropping them a difference of float32 numbers would have hardly a digit left
    scale = torch.ones(DIM)
    scale[:2] = 1e4
    train, test = clusters(230, 0, scale), clusters(90, 1, scale)
    drawn = random_masks(DIM, rate, 12, torch.Generator().manual_seed(2))
    drawn[:, :2] = False
    exact = [Features(split.feats.double(), split.labels) for split in (train, test)]
    assert torch.equal(masked_correct(train, test, drawn, "knn5"), knn_loop(*exact, drawn, 5))


def test_images_without_anything_left_are_at_cosine_0_and_harm_nobody():
    train, test = clusters(230, 0), clusters(90, 1)
    train.feats[5], test.feats[3], test.feats[4, 1:] = 0, 0, 0
    drawn = some_masks()
    drawn[:3, 0] = False
    found, expected = masked_correct(train, test, drawn), knn_loop(train, test, drawn, 20)
    rest = torch.arange(90) != 3
    rest[4] = False
    assert torch.equal(found[:, rest], expected[:, rest])


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_the_probe_equals_scikit_learns_ridge_for_each_mask(ridge):
    found = masked_correct(TRAIN, TEST, some_masks(), "linear", ridge=ridge)
    scaler = StandardScaler().fit(TRAIN.feats.double())
    x, z = scaler.transform(TRAIN.feats.double()), scaler.transform(TEST.feats.double())
    onehot = torch.nn.functional.one_hot(TRAIN.labels).double().numpy()
    for mask, correct in zip(some_masks().numpy(), found):
        alpha = ridge * len(x)
        classifier = RidgeClassifier(alpha=alpha).fit(x[:, mask], TRAIN.labels)
        predicted = torch.from_numpy(classifier.predict(z[:, mask]))
        assert torch.equal(correct, predicted == TEST.labels)
        scores = torch.from_numpy(Ridge(alpha=alpha).fit(x[:, mask], onehot).predict(z[:, mask]))
        assert torch.equal(correct, scores.argmax(1) == TEST.labels)
    assert 0.3 < found.float().mean() < 0.9


def test_the_probe_survives_dimensions_that_never_vary_or_say_the_same():
    train, test = clusters(230, 0), clusters(90, 1)
    for split in (train, test):
        split.feats[:, 3], split.feats[:, 4] = 7.0, split.feats[:, 5]
    drawn = some_masks()
    without = drawn.clone()
    without[:, 3], without[:, 7] = False, True
    drawn[:, 7] = True
    found, expected = (masked_correct(train, test, each, "linear") for each in (drawn, without))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("metric", ["knn5", "linear"])
def test_progress_ends_at_the_number_of_masks(metric):
    calls = []
    masked_correct(TRAIN, TEST, some_masks(), metric, progress=lambda *seen: calls.append(seen))
    assert calls[-1] == (25, 25)
    assert calls == sorted(calls)


def test_below_average_is_below_the_mean_and_empty_for_equal_weights():
    assert below_average(torch.tensor([1.0, 5.0, 2.0, 4.0])).tolist() == [True, False, True, False]
    assert not below_average(torch.ones(4)).any()
