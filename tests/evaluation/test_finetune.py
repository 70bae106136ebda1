"""Fine-tuning: which images it sees, what it trains, and what it leaves alone."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from metamask_plugin.data import load_dataset
from metamask_plugin.data.loaders import EpochShuffle
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.finetune import FineTuneProtocol, finetune, labelled_subset, simclr_protocol
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.linear import linear_probe
from metamask_plugin.modules.encoders import build_encoder

NODE = {"dataset": "digits", "num_workers": 0, "kwargs": {"size": 16}}
# digits: no flips, mild crops
MILD = {"crop_min_scale": 0.8, "horizontal_flip": 0.0}
SHORT = FineTuneProtocol("sgd", lr=0.1, epochs=2, batch_size=32, scheduler="cosine", **MILD)


@pytest.fixture(scope="module")
def data():
    return LabelledImages.read(NODE, 16)


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return build_encoder("conv4", 16, width=4)


def accuracy(logits, labels, top):
    ahead = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    return 100 * (ahead < top).double().mean().item()


def equal(first, second):
    return all(torch.equal(first[key], second[key]) for key in first)


def test_an_untrained_encoder_learns_digits_and_more_than_a_probe_on_it(data, backbone):
    result = finetune(backbone, data, 0.3, replace(SHORT, epochs=5))
    assert result.images == pytest.approx(0.3 * data.sizes["train"], abs=5)
    assert result.acc1_last > 70, "chance is 10"
    assert (result.epochs, result.steps) == (5, 5 * (result.images // 32))
    assert result.acc1_best == max(acc1 for acc1, _ in result.accuracies)
    assert result.acc1_last < result.acc5_last <= 100

    frozen = LabelledImages.read({**NODE, "fraction": 0.3}, 16)
    train, test = (extract_features(backbone, frozen.evaluation_loader(split)) for split in ("train", "test"))
    assert len(train.labels) == result.images, "the same fraction, the same images"
    assert linear_probe(train, test, 10, "fast").acc1_last < result.acc1_last - 5

    tuned = copy.deepcopy(backbone)
    prefix = "backbone."
    own = {key.removeprefix(prefix): value for key, value in result.state_dict.items() if prefix in key}
    tuned.load_state_dict(own)
    feats = extract_features(tuned, data.evaluation_loader("test"))
    logits = feats.feats @ result.state_dict["classifier.weight"].T + result.state_dict["classifier.bias"]
    assert accuracy(logits, feats.labels, 1) == pytest.approx(result.acc1_last)


def test_the_images_are_the_same_whatever_the_encoder_and_the_seed(data, monkeypatch):
    seen = []

    def augmented(images, view, *rest):
        seen.append((images.images, images.labels, view))
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "augmented", augmented)
    for name, seed, subset_seed in (("conv4", 0, 0), ("fc", 7, 0), ("conv4", 0, 1)):
        with pytest.raises(KeyboardInterrupt):
            finetune(build_encoder(name, 16), data, 0.05, seed=seed, subset_seed=subset_seed)
    assert torch.equal(seen[0][0], seen[1][0]) and torch.equal(seen[0][1], seen[1][1])
    assert not torch.equal(seen[0][0], seen[2][0])
    groups = {group for _, _, view in seen for group in view}
    assert groups == {"rrc", "horizontal_flip"}, "crop and flip alone"


@pytest.mark.parametrize("fraction", [0.001, 0.01, 0.1])
def test_a_subset_is_stratified_with_an_image_of_every_class(data, fraction):
    pool = data.images("train")
    chosen = labelled_subset(pool, fraction)
    counts = torch.bincount(chosen.labels, minlength=10)
    assert counts.tolist() == [max(1, round(float(c) * fraction)) for c in torch.bincount(pool.labels)]
    assert torch.equal(chosen.images, load_dataset({**NODE, "fraction": fraction}).train.images)
    assert torch.equal(chosen.images, labelled_subset(pool, fraction).images)


def test_all_labels_by_either_name_and_fractions_that_are_none(data):
    pool = data.images("train")
    assert len(labelled_subset(pool)) == len(labelled_subset(pool, 1.0)) == len(pool)
    for fraction in (0, 1.5, "a tenth", True):
        with pytest.raises(UserError, match="data.fraction must be"):
            labelled_subset(pool, fraction)
    rows = (pool.labels != 3).nonzero().flatten()
    with pytest.raises(
        UserError, match="at least one of every class, got \"none of 1 classes, the first '3'\""
    ):
        labelled_subset(pool.subset(rows), 0.1)


def test_encoder_and_generators_are_left_as_they_were(data, backbone):
    backbone.eval()
    backbone.requires_grad_(False)
    before = copy.deepcopy(backbone.state_dict())
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with torch.no_grad():
        result = finetune(backbone, data, 0.1, SHORT)
    assert torch.equal(torch.rand(2), expected)
    assert equal(before, backbone.state_dict())
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    moved = [key for key in before if not torch.equal(before[key], result.state_dict[f"backbone.{key}"])]
    assert len(moved) == len(before), "weights, and the statistics of batch normalisation"


def test_a_run_says_the_same_twice_and_another_seed_another(data, backbone):
    first, again, other = (finetune(backbone, data, 0.1, SHORT, seed=seed).state_dict for seed in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, other)


def test_what_is_fixed_stays_fixed(data, backbone):
    name, fixed = next(iter(backbone.named_parameters()))
    fixed.requires_grad_(False)
    tuned = finetune(backbone, data, 0.1, SHORT).state_dict
    assert torch.equal(tuned[f"backbone.{name}"], fixed)
    assert sum(not torch.equal(tuned[f"backbone.{key}"], p) for key, p in backbone.named_parameters()) > 3


def test_the_rate_follows_a_batch_that_is_cut_to_the_images(data, backbone):
    images = len(labelled_subset(data.images("train"), 0.02))
    cut = finetune(backbone, data, 0.02, replace(SHORT, batch_size=256, lr=0.8))
    whole = finetune(backbone, data, 0.02, replace(SHORT, batch_size=images, lr=0.8 * images / 256))
    assert cut.steps == whole.steps == 2
    for key, value in cut.state_dict.items():
        torch.testing.assert_close(value, whole.state_dict[key])


def test_the_steps_are_those_of_a_plain_loop(data, backbone):
    protocol = replace(
        SHORT, epochs=3, batch_size=16, crop_min_scale=1.0, weight_decay=0.01
    )  # no augmentation
    tuned = finetune(backbone, data, 0.05, protocol, seed=2)
    chosen = labelled_subset(data.images("train"), 0.05)
    images = torch.cat(
        [x for x, _ in LabelledImages.read({**NODE, "fraction": 0.05}, 16).evaluation_loader("train")]
    )
    network = nn.Sequential(copy.deepcopy(backbone), nn.Linear(backbone.num_features, 10))
    nn.init.zeros_(network[1].weight)
    nn.init.zeros_(network[1].bias)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, tuned.steps)
    order = EpochShuffle(chosen, seed=2)
    for epoch in range(3):
        order.set_epoch(epoch)
        rows = torch.tensor(list(order))
        for batch in rows[: len(rows) // 16 * 16].split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(images[batch]), chosen.labels[batch]).backward()
            optimizer.step()
            cosine.step()
    assert tuned.steps == 3 * (len(chosen) // 16) == cosine.last_epoch
    for found, expected in zip(tuned.state_dict.values(), network.state_dict().values(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    network.load_state_dict(dict(zip(network.state_dict(), tuned.state_dict.values(), strict=True)))
    logits = extract_features(network, data.evaluation_loader("test"))
    assert accuracy(*logits, 4) < accuracy(*logits, 5) == pytest.approx(tuned.acc5_last)


def test_the_protocol_is_simclrs():
    one, ten, all_labels = (simclr_protocol(fraction, 4096) for fraction in (0.01, 0.1, -1))
    assert [protocol.epochs for protocol in (one, ten, all_labels)] == [60, 30, 30]
    assert (one.optimizer, one.momentum, one.nesterov, one.weight_decay) == ("sgd", 0.9, True, 0)
    assert one.lr == pytest.approx(0.8) and simclr_protocol(0.01).lr == pytest.approx(0.05)
    assert one.lr_at(0) == one.lr and one.lr_at(30) == pytest.approx(one.lr / 2)
    assert one.lr_at(59.999) == pytest.approx(0, abs=1e-6)
    constant = replace(one, scheduler="none")
    assert constant.lr_at(0) == constant.lr_at(59.5) == one.lr
    assert one.view == {
        "rrc": {"enabled": True, "crop_min_scale": 0.08, "crop_max_scale": 1.0},
        "horizontal_flip": {"prob": 0.5},
    }
    with pytest.raises(UserError, match="optimizer.batch_size must be >= 2 to fine-tune, got 1"):
        replace(one, batch_size=1)


def test_a_loss_that_is_not_finite_ends_it_with_one_line(data, backbone):
    with pytest.raises(UserError, match="optimizer.lr must keep the loss .* lower optimizer.lr") as caught:
        finetune(backbone, data, 0.2, replace(SHORT, lr=1e30))
    assert "\n" not in str(caught.value)


def test_another_optimizer(data, backbone):
    protocol = replace(SHORT, optimizer="adamw", lr=0.01, weight_decay=0.01, scheduler="none")
    result = finetune(backbone, data, 0.3, protocol)
    assert result.acc1_last > 30


def test_features_that_are_a_map_are_refused(data):
    with pytest.raises(UserError, match="features of shape"):
        finetune(nn.Conv2d(3, 4, 3), data, 0.1, SHORT)


@pytest.fixture
def folders(tmp_path):
    """Two classes of six images each, one dark and one light, and a list of three training images."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, light in (("cat", 60), ("dog", 180)):
            (tmp_path / split / label).mkdir(parents=True)
            for index in range(6):
                pixels = rng.integers(light - 40, light + 40, (24, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / label / f"{label}_{index}.png")
    (tmp_path / "few.txt").write_text("cat_1.png\ndog_5.png\ncat_4.png\n\n")
    return tmp_path


def folder_data(folders, **more):
    paths = {"train_path": str(folders / "train"), "val_path": str(folders / "val")}
    return LabelledImages.read({"dataset": "custom", "num_workers": 0, **paths, **more}, 16)


def test_a_list_of_files_says_which_images(folders, backbone):
    data = folder_data(folders)
    chosen = labelled_subset(data.images("train"), subset_file=folders / "few.txt")
    assert [path.rpartition("/")[2] for path in chosen.paths] == ["cat_1.png", "cat_4.png", "dog_5.png"]
    protocol = replace(SHORT, epochs=10, batch_size=3)
    result = finetune(backbone, data, protocol=protocol, subset_file=folders / "few.txt")
    assert (result.images, result.steps) == (3, 10)
    assert result.acc1_best > 60


def test_lists_that_do_not_fit_are_named(folders, data):
    pool = folder_data(folders).images("train")
    for text, message in (
        (
            "cat_1.png\ncow_1.png",
            "got '1 of 2 that are not there, the first cow_1.png'; check data.train_path",
        ),
        ("cat_1.png", "none of 1 classes, the first 'dog'.*complete data.subset_file"),
    ):
        (folders / "odd.txt").write_text(text)
        with pytest.raises(UserError, match=message):
            labelled_subset(pool, subset_file=folders / "odd.txt")
    with pytest.raises(UserError, match="data.subset_file must be a readable list.*No such file"):
        labelled_subset(pool, subset_file=folders / "none.txt")
    with pytest.raises(UserError, match="left out where images lie in memory"):
        labelled_subset(data.images("train"), subset_file=folders / "few.txt")
