"""Accuracy by region: encoders that see only one region, what is fitted and how often, and the seeds."""

import statistics

import pytest
import torch
from torch import nn

from metamask_plugin.data import MemoryImages
from metamask_plugin.data.regions import region_of
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import regions
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.knn import knn_accuracies
from metamask_plugin.evaluation.linear import LinearProtocol, linear_probe
from metamask_plugin.evaluation.regions import region_accuracies, summarise_seeds

QUICK = LinearProtocol("adam", lr=3e-2, epochs=30, batch_size=64)
CLASSES = 4
GREY = 128 / 255


class Data:
    """Colours of the class in the foreground box, colours of the class with another key around it."""

    def __init__(self):
        self.asked = []

    def __call__(self, split, region):
        self.asked.append((split, region))
        count, seed = {"train": (160, 0), "test": (80, 1)}[split]
        generator = torch.Generator().manual_seed(seed)
        labels = torch.arange(count) % CLASSES
        colours = torch.tensor([[230, 60, 60], [60, 230, 60], [60, 60, 230], [220, 220, 60]])
        images = colours[(labels + 1) % CLASSES][:, :, None, None].repeat(1, 1, 16, 16)
        images[:, :, 4:12, 4:12] = colours[labels][:, :, None, None]
        noise = torch.randint(-20, 21, images.shape, generator=generator)
        boxes = torch.tensor([[4, 4, 12, 12]], dtype=torch.int32).repeat(count, 1)
        whole = MemoryImages((images + noise).to(torch.uint8), labels, list("abcd"), boxes)
        seen = region_of(whole, region, (GREY,) * 3)
        x = seen.images.float() / 255 - GREY
        return list(zip(x.split(64), labels.split(64)))


class Inside(nn.Module):
    """Mean colour inside the box."""

    def forward(self, x):
        return x[:, :, 4:12, 4:12].mean(dim=(2, 3))


class Outside(nn.Module):
    """Mean colour of the upper rows, which lie outside the box."""

    def forward(self, x):
        return x[:, :, :4].mean(dim=(2, 3))


def by_region(rows):
    return {row["tested on"]: row for row in rows}


@pytest.mark.parametrize("fit_on", ["trained", "tested"])
@pytest.mark.parametrize(
    ("encoder", "seen", "unseen"),
    [(Inside, "foreground", "background"), (Outside, "background", "foreground")],
)
def test_an_encoder_of_one_region_fails_on_the_other_alone(encoder, seen, unseen, fit_on):
    rows = by_region(region_accuracies(encoder(), Data(), fit_on=fit_on, protocol=QUICK))
    assert list(rows) == ["full", "foreground", "background"]
    for column in ("knn5", "linear"):
        assert rows["full"][column] == rows[seen][column] == 100
        assert rows[unseen][column] <= 50, "nothing but grey is left"


def test_a_classifier_of_backgrounds_is_misled_by_foregrounds():
    """Foreground and background colours mean different classes: which of them was learnt shows."""

    class Everything(nn.Module):
        def forward(self, x):
            return x.mean(dim=(2, 3))

    same = by_region(region_accuracies(Everything(), Data(), "background", "tested", protocol=QUICK))
    other = by_region(region_accuracies(Everything(), Data(), "background", "trained", protocol=QUICK))
    assert (
        same["background"] == other["background"] == {"tested on": "background", "knn5": 100, "linear": 100}
    )
    assert same["foreground"]["knn5"] == same["foreground"]["linear"] == 100
    assert other["foreground"]["knn5"] == other["foreground"]["linear"] == 0


@pytest.mark.parametrize(
    ("trained_on", "fit_on"), [("full", "trained"), ("foreground", "trained"), ("full", "tested")]
)
def test_rows_hold_what_the_functions_give(trained_on, fit_on):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Flatten(), nn.Linear(768, 3))
    found = by_region(region_accuracies(encoder, Data(), trained_on, fit_on, k=7, protocol=QUICK, seed=3))
    for region, row in found.items():
        fitted = region if fit_on == "tested" else trained_on
        train = extract_features(encoder, Data()("train", fitted))
        test = extract_features(encoder, Data()("test", region))
        assert row["knn7"] == knn_accuracies(train, test, (7,))[7].acc1
        assert row["linear"] == linear_probe(train, test, CLASSES, QUICK, seed=3).acc1_last
    assert len({row["linear"] for row in found.values()}) > 1


@pytest.mark.parametrize(("fit_on", "fits", "read"), [("trained", 1, 4), ("tested", 3, 6)])
def test_images_are_read_once_and_the_probe_is_fitted_once_for_each_bank(monkeypatch, fit_on, fits, read):
    fitted = []

    def counted(*args, **kwargs):
        fitted.append(1)
        return linear_probe(*args, **kwargs)

    monkeypatch.setattr(regions, "linear_probe", counted)
    data = Data()
    region_accuracies(Inside(), data, "foreground", fit_on, protocol=QUICK)
    assert len(fitted) == fits
    assert len(data.asked) == len(set(data.asked)) == read
    trained = {region for split, region in data.asked if split == "train"}
    assert trained == ({"foreground"} if fit_on == "trained" else {"full", "foreground", "background"})


def test_the_probe_may_be_left_out_and_wrong_names_are_named():
    rows = region_accuracies(Inside(), Data(), protocol=None)
    assert [list(row) for row in rows] == [["tested on", "knn5"]] * 3
    with pytest.raises(UserError, match="trained_on must be one of background, foreground, full"):
        region_accuracies(Inside(), Data(), "fore")
    with pytest.raises(UserError, match="fit_on must be one of tested, trained"):
        region_accuracies(Inside(), Data(), fit_on="test")


def row(name, seed, accuracy, tested="full", **more):
    return {
        "name": name,
        "seed": seed,
        "trained on": "full",
        "tested on": tested,
        "setting": 1,
        "knn5": accuracy,
        **more,
    }


def test_seeds_of_a_name_and_region_are_averaged():
    rows = [row("a", 1, 50.0), row("a", 1, 20.0, "foreground"), row("b", 1, 70.0, linear=71.0)]
    rows += [row("a", 2, 53.0), row("a", 3, 59.0), row("a", 2, 30.0, "foreground")]
    first, second, third = summarise_seeds(rows)
    assert first == {
        "name": "a",
        "trained on": "full",
        "tested on": "full",
        "setting": 1,
        "n": 3,
        "knn5": pytest.approx(54.0),
        "knn5_std": pytest.approx(statistics.stdev([50, 53, 59])),
    }
    assert (second["n"], second["knn5"], second["tested on"]) == (2, 25.0, "foreground")
    assert (third["knn5"], third["knn5_std"], third["linear"], third["linear_std"]) == (70, None, 71, None)


def test_the_same_seed_twice_is_no_spread_over_seeds():
    with pytest.raises(
        UserError, match=r"runs 'a' trained on full images must be of different seeds, got \[4, 4\]"
    ):
        summarise_seeds([row("a", 4, 50.0), row("a", 4, 51.0)])
