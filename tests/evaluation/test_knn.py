"""kNN against explicit loops, and the metric against the function."""

import math

import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import knn
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.knn import (
    WeightedKNNClassifier,
    knn_accuracies,
    knn_hits,
    knn_table,
    masked_features,
    vote,
    vote_temperature,
)

CLASSES = 7


def clusters(count, seed, dim=6, spread=1.0):
    centres = torch.randn(CLASSES, dim, generator=torch.Generator().manual_seed(99))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (count,), generator=generator)
    return Features(centres[labels] + spread * torch.randn(count, dim, generator=generator), labels)


TRAIN, TEST = clusters(60, 0), clusters(25, 1)


def oracle(train, test, k, temperature, distance):
    """One test image and one neighbour at a time, in Python floats."""
    scores = []
    for h in test.feats.double():
        weighted = []
        for g, label in zip(train.feats.double(), train.labels.tolist()):
            if distance == "cosine":
                similarity = float(h @ g / (h.norm() * g.norm()))
                weighted.append((similarity, math.exp(similarity / temperature), label))
            else:
                gap = float((h - g).norm())
                weighted.append((-gap, 1 / (gap + 1e-5), label))
        votes = [0.0] * CLASSES
        for _, weight, label in sorted(weighted, reverse=True)[:k]:
            votes[label] += weight
        scores.append([vote / sum(votes) for vote in votes])
    return torch.tensor(scores)


def scores_of(k, temperature=None, distance="cosine"):
    chunks = knn._nearest(TRAIN.feats, TEST.feats, k, distance)
    settings = (CLASSES, vote_temperature(k, temperature), distance)
    return torch.cat([vote(near, TRAIN.labels[indices], *settings) for _, near, indices in chunks])


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 20, 60])
@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_scores_equal_the_loop(distance, k, temperature):
    scores = scores_of(k, temperature, distance)
    expected = oracle(TRAIN, TEST, k, temperature, distance)
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_accuracies_equal_the_loop(distance):
    found = knn_accuracies(TRAIN, TEST, k=(1, 5, 20), temperature=0.07, distance=distance)
    for k, accuracy in found.items():
        hits1 = hits5 = 0
        for votes, label in zip(oracle(TRAIN, TEST, k, 0.07, distance).tolist(), TEST.labels.tolist()):
            ranked = sorted(range(CLASSES), key=lambda c: -votes[c])
            hits1 += ranked[0] == label
            hits5 += label in [c for c in ranked[:5] if votes[c] > 0]
        assert accuracy.acc1 == pytest.approx(100 * hits1 / len(TEST.labels))
        assert accuracy.acc5 == pytest.approx(100 * hits5 / len(TEST.labels))
    assert 30 < found[20].acc1 < 100, "the clusters should be neither trivial nor hopeless"


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_chunks_do_not_change_the_result(distance, monkeypatch):
    whole = knn_accuracies(TRAIN, TEST, distance=distance)
    monkeypatch.setattr(knn, "CHUNK_ENTRIES", 3 * len(TRAIN.labels) + 1)
    sizes = [len(values) for _, values, _ in knn._nearest(TRAIN.feats, TEST.feats, 5, distance)]
    assert sizes == [3] * 8 + [1]
    assert knn_accuracies(TRAIN, TEST, distance=distance) == whole


def test_a_k_above_the_bank_is_clipped_and_keeps_its_key():
    found = knn_accuracies(TRAIN, TEST, k=(60, 200))
    assert set(found) == {60, 200}
    assert found[60] == found[200]


def test_each_k_votes_by_its_own_protocol_unless_a_temperature_is_given():
    own = knn_accuracies(TRAIN, TEST, k=(5, 20))
    assert own[5] == knn_accuracies(TRAIN, TEST, k=(5,), temperature=1.0)[5]
    assert own[20] == knn_accuracies(TRAIN, TEST, k=(20,), temperature=0.07)[20]
    assert own[5] != knn_accuracies(TRAIN, TEST, k=(5,), temperature=0.01)[5]


def test_a_tiny_temperature_is_the_nearest_neighbour_and_does_not_overflow():
    scores, nearest = scores_of(20, temperature=1e-4), scores_of(1)
    assert scores.isfinite().all()
    assert torch.equal(scores.argmax(1), nearest.argmax(1))


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_an_image_that_lies_in_the_bank_finds_itself(distance):
    shifted = Features(TRAIN.feats + (100 if distance == "euclidean" else 0), TRAIN.labels)
    assert knn_accuracies(shifted, shifted, k=(1,), distance=distance)[1].acc1 == 100


def test_top5_counts_no_class_that_has_no_vote():
    train = Features(torch.eye(3), torch.tensor([0, 1, 2]))
    test = Features(torch.tensor([[1.0, 0.1, 0.0]]), torch.tensor([2]))
    assert knn_accuracies(train, test, k=(1, 2, 3)) == {1: (0, 0), 2: (0, 0), 3: (0, 100)}


def test_the_mask_multiplies_the_features():
    mask = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 0.0])
    table = knn_table(TRAIN, TEST, mask, ks=(5, 20))
    byhand = [Features(split.feats * mask, split.labels) for split in (TRAIN, TEST)]
    assert list(table) == ["knn5", "knn20", "knn5_masked", "knn20_masked"]
    assert table["knn20"] == knn_accuracies(TRAIN, TEST, k=(20,))[20].acc1
    assert table["knn20_masked"] == knn_accuracies(*byhand, k=(20,))[20].acc1 != table["knn20"]
    assert "knn5_masked" not in knn_table(TRAIN, TEST, ks=(5,))
    with pytest.raises(UserError, match="mask must be one weight for each of the 6 dimensions"):
        masked_features(TRAIN, mask[:3])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"k": (0,)}, "k must be >= 1, got 0"),
        ({"k": ()}, "k must be >= 1"),
        ({"distance": "cosin"}, "did you mean 'cosine'"),
        ({"temperature": 0.0}, "temperature must be > 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        knn_hits(TRAIN, TEST, **settings)


def test_features_that_do_not_fit_are_named():
    with pytest.raises(UserError, match="of one dimension, got \\(6, 5\\)"):
        knn_hits(TRAIN, Features(TEST.feats[:, :5], TEST.labels))
    with pytest.raises(UserError, match="training labels must be >= 0, got -1"):
        knn_hits(Features(TRAIN.feats, TRAIN.labels - 1), TEST)
    with pytest.raises(UserError, match="test labels"):
        knn_hits(TRAIN, Features(TEST.feats, TEST.labels[:3]))
    with pytest.raises(UserError, match="training features must be at least one"):
        knn_hits(Features(TRAIN.feats[:0], TRAIN.labels[:0]), TEST)


@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_the_metric_equals_the_function_over_batches(distance):
    metric = WeightedKNNClassifier(k=20, T=0.07, distance_fx=distance)
    for feats, labels in zip(TRAIN.feats.split(13), TRAIN.labels.split(13)):
        assert metric(train_features=feats, train_targets=labels) is None
    for feats, labels in zip(TEST.feats.split(7), TEST.labels.split(7)):
        metric(test_features=feats, test_targets=labels)
    assert metric.compute() == tuple(knn_accuracies(TRAIN, TEST, (20,), distance=distance)[20])


def test_the_metric_starts_anew_after_compute():
    metric = WeightedKNNClassifier(k=5)
    metric(train_features=TEST.feats, train_targets=TEST.labels)
    metric(test_features=TEST.feats, test_targets=TEST.labels)
    first = metric.compute()
    metric(train_features=TRAIN.feats, train_targets=TRAIN.labels)
    metric(test_features=TEST.feats, test_targets=TEST.labels)
    second = metric.compute()
    assert second == tuple(knn_accuracies(TRAIN, TEST, (5,), metric.T)[5]) != first


def test_the_metric_without_features_gives_minus_one_and_refuses_halves():
    metric = WeightedKNNClassifier()
    metric(train_features=TRAIN.feats, train_targets=TRAIN.labels)
    assert metric.compute() == (-1, -1)
    with pytest.raises(UserError, match="given together"):
        metric(test_features=TEST.feats)
    with pytest.raises(UserError, match="equally many, got \\(25, 3\\)"):
        metric(test_features=TEST.feats, test_targets=TEST.labels[:3])
