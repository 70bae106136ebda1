"""Probes: schedules, recovery of a known rule, reproducibility, and the head that comes out."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.linear import PROTOCOLS, LinearProtocol, build_head, linear_probe

QUICK = LinearProtocol("adam", lr=1e-2, epochs=40, batch_size=64, scheduler="cosine")


def separable(count, seed, dim=8, classes=4):
    """Labels by the largest of fixed linear scores; features of very different scales."""
    rule = torch.randn(dim, classes, generator=torch.Generator().manual_seed(7))
    feats = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))
    scales = torch.logspace(-3, 3, dim)
    return Features(feats * scales + 5 * scales, (feats @ rule).argmax(dim=1))


def ring(count, seed):
    """Inside or outside of a circle: no linear rule."""
    feats = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    return Features(feats, (feats.norm(dim=1) > 1.1).long())


TRAIN, TEST = separable(400, 0), separable(200, 1)


@pytest.mark.parametrize("protocol", [QUICK, "fast", "solo"])
def test_a_linear_rule_is_found_whatever_the_scale_of_the_features(protocol):
    assert linear_probe(TRAIN, TEST, 4, protocol).acc1_last > 90


def test_the_mlp_finds_what_the_linear_head_cannot():
    train, test = ring(600, 0), ring(300, 1)
    linear = linear_probe(train, test, 2, QUICK, head="linear").acc1_last
    mlp = linear_probe(train, test, 2, QUICK, head="mlp").acc1_last
    assert linear < 65
    assert mlp > 92


def test_the_returned_head_takes_plain_features_and_reproduces_the_accuracy():
    for kind, mask in (("linear", None), ("mlp", None), ("linear", torch.linspace(0, 2, 8))):
        result = linear_probe(TRAIN, TEST, 4, QUICK, head=kind, mask=mask)
        head = build_head(kind, 8, 4)
        head.load_state_dict(result.state_dict)
        predicted = head.eval()(TEST.feats).argmax(dim=1)
        assert 100 * (predicted == TEST.labels).float().mean().item() == pytest.approx(result.acc1_last)


def test_unit_length_is_blind_to_the_length_of_the_features_and_part_of_the_head():
    protocol = replace(QUICK, scaling="l2")
    found = linear_probe(TRAIN, TEST, 4, protocol)
    lengths = [torch.linspace(0.1, 10, len(split.labels))[:, None] for split in (TRAIN, TEST)]
    rescaled = [Features(split.feats * by, split.labels) for split, by in zip((TRAIN, TEST), lengths)]
    again = linear_probe(*rescaled, 4, protocol)
    assert again.acc1_last == pytest.approx(found.acc1_last, abs=1)
    assert linear_probe(*rescaled, 4, QUICK).acc1_last < linear_probe(TRAIN, TEST, 4, QUICK).acc1_last - 2
    head = build_head("linear", 8, 4, "l2")
    head.load_state_dict(found.state_dict)
    predicted = head(TEST.feats).argmax(dim=1)
    assert 100 * (predicted == TEST.labels).float().mean().item() == pytest.approx(found.acc1_last)


def test_best_is_the_first_largest_of_the_curve_and_top5_of_four_classes_is_certain():
    result = linear_probe(TRAIN, TEST, 4, QUICK)
    assert result.acc1_best >= result.acc1_last
    assert 1 <= result.best_epoch <= result.epochs == 40
    assert result.acc5_last == 100
    short = LinearProtocol("adam", lr=1e-2, epochs=1, batch_size=64)
    one = linear_probe(TRAIN, TEST, 4, short)
    assert (one.acc1_best, one.best_epoch) == (one.acc1_last, 1)


def test_top5_is_counted_by_rank():
    train, test = separable(300, 0, classes=9), separable(200, 1, classes=9)
    result = linear_probe(train, test, 9, LinearProtocol("sgd", lr=1e-3, epochs=2, batch_size=100))
    head = build_head("linear", 8, 9)
    head.load_state_dict(result.state_dict)
    logits = head.eval()(test.feats)
    own = logits.gather(1, test.labels[:, None])
    rank = (logits > own).sum(dim=1)
    assert result.acc5_last == pytest.approx(100 * (rank < 5).float().mean().item())
    assert result.acc1_last < result.acc5_last < 100


def test_the_seed_decides_and_global_generators_are_untouched():
    short = LinearProtocol("sgd", lr=0.05, epochs=2, batch_size=64)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = linear_probe(TRAIN, TEST, 4, short, head="mlp", seed=1).state_dict
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again = linear_probe(TRAIN, TEST, 4, short, head="mlp", seed=1).state_dict
    other = linear_probe(TRAIN, TEST, 4, short, head="mlp", seed=2).state_dict
    key = "classifier.0.weight"
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[key], other[key])


def test_features_are_not_changed_and_gradients_may_be_off_outside():
    copy = TRAIN.feats.clone()
    with torch.no_grad():
        outside = linear_probe(TRAIN, TEST, 4, QUICK, mask=torch.full((8,), 0.5))
    assert torch.equal(TRAIN.feats, copy)
    assert outside.acc1_last > 90


def test_one_step_of_sgd_equals_the_formula():
    """Full batch, one epoch: W1 = W0 - lr * (dCE/dW + wd * W0), on standardised features."""
    settings = {"lr": 0.3, "epochs": 1, "batch_size": 400, "weight_decay": 0.1}
    moved = linear_probe(TRAIN, TEST, 4, LinearProtocol("sgd", **settings)).state_dict
    still = linear_probe(TRAIN, TEST, 4, LinearProtocol("sgd", **{**settings, "lr": 1e-30})).state_dict
    x = (TRAIN.feats - TRAIN.feats.mean(0)) / TRAIN.feats.std(0, correction=0)
    w0, b0 = still["classifier.0.weight"], still["classifier.0.bias"]
    error = (x @ w0.T + b0).softmax(1) - nn.functional.one_hot(TRAIN.labels, 4)
    expected = w0 - 0.3 * (error.T @ x / 400 + 0.1 * w0)
    torch.testing.assert_close(moved["classifier.0.weight"], expected, rtol=1e-4, atol=1e-5)
    assert w0.abs().max() <= 8**-0.5


def test_masked_out_dimensions_have_no_say():
    result = linear_probe(TRAIN, TEST, 4, QUICK, mask=torch.tensor([1.0] * 4 + [0.0] * 4))
    weight = result.state_dict["classifier.0.weight"]
    assert (weight[:, 4:] == 0).all()
    assert (weight[:, :4] != 0).any()
    with pytest.raises(UserError, match="mask must be of length 8"):
        linear_probe(TRAIN, TEST, 4, QUICK, mask=torch.ones(3))


def test_a_dimension_that_never_varies_does_no_harm():
    train, test = (
        Features(torch.cat([split.feats, torch.full((len(split.feats), 2), value)], dim=1), split.labels)
        for split, value in ((TRAIN, 0.0), (TEST, 1e-3))
    )
    train.feats[:, -1], test.feats[:, -1] = 0.1, 0.2
    assert linear_probe(train, test, 4, QUICK).acc1_last > 90


def test_schedules_pass_through_their_landmarks():
    paper = PROTOCOLS["paper"]
    assert (paper.optimizer, paper.epochs, paper.batch_size, paper.weight_decay) == ("adam", 500, 1000, 5e-6)
    assert paper.lr_at(0) == 1e-2
    assert paper.lr_at(250) == pytest.approx(1e-4)
    assert paper.lr_at(500) == pytest.approx(1e-6)
    solo = PROTOCOLS["solo"]
    assert [solo.lr_at(epoch) for epoch in (59, 60, 79, 80)] == pytest.approx([0.1, 0.01, 0.01, 0.001])
    assert QUICK.lr_at(20) == pytest.approx(5e-3)
    assert QUICK.lr_at(10) == pytest.approx(1e-2 * (1 + math.sqrt(0.5)) / 2)
    assert LinearProtocol("sgd", lr=0.2, epochs=3, batch_size=1).lr_at(2) == 0.2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lars"}, "optimizer.name must be one of adam, adamw, sgd"),
        ({"scheduler": "steps"}, "did you mean 'step'"),
        ({"lr": 0}, "optimizer.lr must be > 0"),
        ({"epochs": 0}, "max_epochs must be >= 1"),
        ({"batch_size": 0}, "optimizer.batch_size must be >= 1"),
        ({"weight_decay": -1}, "optimizer.weight_decay must be >= 0"),
        ({"scheduler": "exponential"}, "scheduler.min_lr must be > 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        LinearProtocol(**{"optimizer": "sgd", "lr": 0.1, "epochs": 1, "batch_size": 8, **settings})


def test_wrong_names_labels_and_divergence_are_named():
    with pytest.raises(UserError, match="protocol must be one of fast, icl_msr, paper, solo"):
        linear_probe(TRAIN, TEST, 4, "papers")
    with pytest.raises(UserError, match="head must be one of linear, mlp"):
        linear_probe(TRAIN, TEST, 4, QUICK, head="tree")
    with pytest.raises(UserError, match=r"training labels must be from 0 to 2, got \(0, 3\)"):
        linear_probe(TRAIN, TEST, 3, QUICK)
    with pytest.raises(UserError, match="lower optimizer.lr"):
        linear_probe(TRAIN, TEST, 4, LinearProtocol("sgd", lr=1e38, epochs=5, batch_size=50))
