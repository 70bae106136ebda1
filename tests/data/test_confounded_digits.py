import hashlib
import time

import pytest
import torch

from metamask_plugin.data.datasets.confounded_digits import (
    PATCH,
    REGIONS,
    _render,
    boxes_of,
    confounded_digits,
)
from metamask_plugin.data.datasets.digits import raw_digits
from metamask_plugin.errors import UserError


def own_share(split) -> float:
    return (split.backgrounds == split.labels).float().mean().item()


def test_shapes_dtypes_and_time():
    begin = time.perf_counter()
    train, test = confounded_digits()
    assert time.perf_counter() - begin < 10  # 0.5 s measured; generous, for a busy machine
    for split, count in ((train, 1297), (test, 500)):
        assert split.images.shape == (count, 3, 32, 32) and split.images.dtype == torch.uint8
        assert split.masks.shape == (count, 32, 32) and split.masks.dtype == torch.bool
        assert split.boxes.shape == (count, 4) and split.boxes.dtype == torch.int32
        assert split.backgrounds.shape == (count,) and split.backgrounds.dtype == torch.int64


def test_regions_are_disjoint_and_hold_patches():
    assert len(REGIONS) == 10
    assert [sum(region[1] == photo for region in REGIONS) for photo in (0, 1)] == [5, 5]
    for i, (_, photo, x0, y0, x1, y1) in enumerate(REGIONS):
        assert 0 <= x0 < x1 <= 640 and 0 <= y0 < y1 <= 427
        assert min(x1 - x0, y1 - y0) >= PATCH + 10
        for _, other, u0, v0, u1, v1 in REGIONS[:i]:
            assert other != photo or x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9, 1.0])
def test_correlation_is_what_was_asked_for(correlation):
    train, test = confounded_digits(correlation, size=16, copies=3)
    # four standard deviations of a binomial share
    assert own_share(train) == pytest.approx(correlation + (1 - correlation) / 10, abs=4 * 0.5 / 3891**0.5)
    assert own_share(test) == pytest.approx(0.1, abs=4 * 0.3 / 500**0.5)
    assert torch.bincount(test.backgrounds, minlength=10).min() >= 25


def test_test_split_is_the_same_for_every_correlation_and_copies():
    _, one = confounded_digits(0.0, size=16)
    _, two = confounded_digits(0.9, size=16, copies=2)
    assert torch.equal(one.images, two.images)


def test_deterministic_by_seed_without_touching_the_global_generator():
    state = torch.get_rng_state()
    first, again, other = (confounded_digits(size=16, seed=seed)[0] for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.images, again.images) and torch.equal(first.backgrounds, again.backgrounds)
    assert not torch.equal(first.backgrounds, other.backgrounds)
    assert (first.images != other.images).float().mean() > 0.5


def test_copies_differ():
    train, _ = confounded_digits(size=16, copies=2)
    assert len(train) == 2 * 1297
    assert torch.equal(train.labels[:1297], train.labels[1297:])
    assert (train.images[:1297] != train.images[1297:]).flatten(1).any(1).all()


def test_a_single_test_copy_is_what_recorded_runs_were_evaluated_on():
    _, test = confounded_digits(size=16)
    drawn = torch.cat([test.backgrounds, test.labels]).numpy().tobytes()
    assert hashlib.sha256(drawn).hexdigest()[:16] == "1caf302a505e534e"
    # the last bit of a pixel is the processor's: the sum, and the renderer alone on this one
    assert test.images.sum().item() == pytest.approx(41_508_006, rel=1e-5)
    alone, masks, _ = _render(*raw_digits()[1], 0.0, 16, torch.Generator().manual_seed(1))
    assert torch.equal(test.images, alone) and torch.equal(test.masks, masks)


def test_further_test_copies_follow_the_first_and_leave_training_as_it_is():
    (train, one), (same, three) = (confounded_digits(size=16, test_copies=copies) for copies in (1, 3))
    for name in ("images", "labels", "boxes", "masks", "backgrounds", "originals"):
        assert torch.equal(getattr(three, name)[:500], getattr(one, name)), name
        assert torch.equal(getattr(same, name), getattr(train, name)), name
    assert len(three) == 1500 and torch.equal(three.labels, one.labels.repeat(3))
    first, second, third = three.images.split(500)
    for left, right in ((first, second), (first, third), (second, third)):
        assert (left != right).flatten(1).any(1).all()
    # drawn anew: four standard deviations of a share of 0.1
    for left, right in ((0, 500), (500, 1000)):
        alike = three.backgrounds[left : left + 500] == three.backgrounds[right : right + 500]
        assert alike.float().mean().item() == pytest.approx(0.1, abs=4 * 0.3 / 500**0.5)


def test_originals_say_which_handwritten_digit_an_image_shows():
    train, test = confounded_digits(size=16, copies=2, test_copies=3)
    for split, (_, labels), copies in zip((train, test), raw_digits(), (2, 3)):
        assert split.originals.dtype == torch.int64
        assert torch.equal(split.originals.bincount(), torch.full((len(labels),), copies))
        assert torch.equal(split.labels, labels[split.originals])
    # how much of its box a digit fills is its own: 0.83 between its renderings, 0.27 with others of the class
    x0, y0, x1, y1 = train.boxes.T
    filled = train.masks.sum((1, 2)) / ((x1 - x0) * (y1 - y0))
    assert torch.corrcoef(filled.view(2, 1297))[0, 1] > 0.7
    assert torch.equal(test.subset([501, 3]).originals, torch.tensor([1, 3]))


def test_masks_fill_their_boxes():
    train, _ = confounded_digits()
    x0, y0, x1, y1 = train.boxes.T
    assert (x0 >= 0).all() and (x1 <= 32).all() and (x1 > x0).all() and (y0 >= 0).all() and (y1 <= 32).all()
    pixel = torch.arange(32)
    in_x = (pixel >= x0[:, None]) & (pixel < x1[:, None])
    in_y = (pixel >= y0[:, None]) & (pixel < y1[:, None])
    assert not (train.masks & ~(in_y[:, :, None] & in_x[:, None])).any()
    # tight: first and last row and column of each box hold foreground
    assert train.masks.any(1).gather(1, torch.stack([x0, x1 - 1], 1).long()).all()
    assert train.masks.any(2).gather(1, torch.stack([y0, y1 - 1], 1).long()).all()
    assert 0.08 < train.masks.float().mean() < 0.35


def test_boxes_of_one_pixel():
    mask = torch.zeros(1, 5, 7, dtype=torch.bool)
    mask[0, 2, 4] = True
    assert boxes_of(mask).tolist() == [[4, 2, 5, 3]]


def test_digits_stand_out_from_their_background():
    train, _ = confounded_digits()
    luma = torch.einsum("nchw,c->nhw", train.images.float() / 255, torch.tensor([0.299, 0.587, 0.114]))
    inside = (luma * train.masks).sum((1, 2)) / train.masks.sum((1, 2))
    outside = (luma * ~train.masks).sum((1, 2)) / (~train.masks).sum((1, 2))
    contrast = (inside - outside).abs()
    assert contrast.median() > 0.25
    assert (contrast > 0.1).float().mean() > 0.9


def test_subset_keeps_backgrounds():
    train, _ = confounded_digits(size=16)
    picked = train.subset([10, 3])
    assert torch.equal(picked.backgrounds, train.backgrounds[[10, 3]])
    assert torch.equal(picked.boxes, train.boxes[[10, 3]])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("correlation", 1.2),
        ("correlation", "high"),
        ("size", 8),
        ("seed", -1),
        ("copies", 0),
        ("test_copies", 0),
    ],
)
def test_options_are_checked(option, value):
    with pytest.raises(UserError, match=rf"data\.kwargs\.{option} must be"):
        confounded_digits(**{option: value})
