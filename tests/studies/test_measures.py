"""What single measures find, against what is known of the encoder."""

import json
from dataclasses import replace
from itertools import product

import pytest
import torch
from composing import composed
from omegaconf import OmegaConf
from PIL import Image
from torch import nn

from metamask_plugin.cli.config import complete, for_method
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.methods import METHODS
from metamask_plugin.modules.encoders import build_encoder
from metamask_plugin.studies.measures import MEASURES
from metamask_plugin.studies.subject import Subject, subject_of_checkpoint

DATA = {"dataset": "digits", "num_workers": 0, "kwargs": {"size": 16}}


@pytest.fixture
def run(tmp_path):
    """The folder of an untrained encoder of 32 dimensions; its mask is 1 on one half and 2 on the other."""
    torch.manual_seed(0)
    encoder = build_encoder("conv4", 16, width=4)
    state = {f"backbone.{key}": value for key, value in encoder.state_dict().items()}
    weight = torch.ones(32)
    weight[16:] = 2
    torch.save({"state_dict": {**state, "mask.weight": weight}}, tmp_path / "last.ckpt")
    args = {
        "method": "metamask",
        "method_kwargs": {"meta": {"enabled": True}},
        "backbone": {"name": "conv4", "kwargs": {"width": 4}},
        "augmentations": [{"crop_size": 16, "num_crops": 2}],
        "data": DATA,
    }
    (tmp_path / "args.json").write_text(json.dumps(args))
    (tmp_path / "metrics.csv").write_text(
        "epoch,train_seconds,train_cpu_seconds\n0,9.0,18.0\n1,2.0,4.0\n2,4.0,6.0\n"
    )
    return tmp_path


@pytest.fixture
def subject(run):
    return subject_of_checkpoint(str(run), {}, seed=0, title="mine")


def values(measured, **where):
    return {
        row["metric"]: row["value"]
        for row in measured.rows
        if all(row.get(column) == value for column, value in where.items())
    }


def test_cost_leaves_out_the_first_epoch_and_the_online_classifier(run):
    model = nn.ModuleDict(
        {"backbone": nn.Linear(3, 2), "mask": nn.Linear(4, 1, bias=False), "classifier": nn.Linear(9, 9)}
    )
    pretrained = load_encoder(run)
    data = LabelledImages.read(DATA, 16)
    subject = Subject("mine", 0, {"last": pretrained}, data, run, model)
    found = values(MEASURES["cost"](subject))
    assert found["parameters"] == 8 + 4 and found["parameters: mask"] == 4
    assert found["epochs"] == 3
    assert found["seconds_per_epoch"] == 3 and found["seconds"] == 15
    assert found["cpu_seconds_per_epoch"] == 5 and found["cpu_seconds"] == 28
    pretrained.args["method_kwargs"]["meta"]["enabled"] = (
        False  # without meta-learning the mask is no parameter
    )
    assert values(MEASURES["cost"](subject))["parameters"] == 8


HEADS = {  # a bias before each BatchNorm, and a BatchNorm behind each head, which ours do without
    "SimCLR": (("method=baseline",), 13.01, 12.75, 2048 + 2 * 256),
    "Barlow Twins": (("task=barlow_twins", "method=baseline"), 22.73, 20.62, 2 * 2048 + 2 * 2048),
    "SimCLR + Barlow Twins": (("ablation=no_meta",), 24.57, 22.20, 3 * 2048 + 2 * 2048 + 2 * 256),
}


@pytest.mark.parametrize("arm", HEADS)
def test_parameters_are_those_of_metamasks_table_3(arm, run):
    """In millions; the release's are counted by hand from its models, the paper's are rounded to 0.1."""
    overrides, with_predictors, without, ours_omits = HEADS[arm]
    heads = "++method_kwargs.task_kwargs.proj_output_dim="
    width = f"{heads}{2048 if arm == 'Barlow Twins' else 256}"
    cfg = composed("pretrain", "cifar/metamask_barlow", *overrides, width)
    OmegaConf.set_struct(cfg, False)
    own = for_method(complete(cfg), 10)
    with torch.device("meta"):
        model = METHODS[own.method](own)
    pretrained = load_encoder(run)
    pretrained.args["method_kwargs"]["meta"]["enabled"] = False
    subject = Subject("mine", 0, {"last": pretrained}, LabelledImages.read(DATA, 16), run, model)
    found = values(MEASURES["cost"](subject, predictors=True))
    assert (found["parameters"] + ours_omits) / 1e6 == pytest.approx(without, abs=0.005)
    assert (found["parameters_with_predictors"] + ours_omits) / 1e6 == pytest.approx(
        with_predictors, abs=0.005
    )
    assert round(found["parameters_with_predictors"] / 1e6, 1) == round(with_predictors, 1)


def test_labelled_images_are_those_of_the_lists_or_drawn(subject, tmp_path):
    protocol = {"epochs": 1, "batch_size": 32}
    drawn = MEASURES["few_labels"](subject, fractions=[0.05, 0.1], **protocol)
    assert drawn.about == "5 %, 10 % of the labels: drawn class by class, seed 0"
    with pytest.raises(UserError, match=r"subset_files must be a list of 1 files, one for each of \[0.1\]"):
        MEASURES["few_labels"](subject, fractions=[0.1], subset_files=["x", "y"], **protocol)


def test_labelled_images_of_a_list(run, tmp_path):
    for split, label, index in product(("train", "test"), "ab", range(6)):
        file = tmp_path / "images" / split / label / f"{label}{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (index * 20, 0, 0)).save(file)
    (tmp_path / "list.txt").write_text("a0.png\nb1.png\nb3.png\n")
    paths = {
        f"{key}_path": str(tmp_path / "images" / split)
        for key, split in (("train", "train"), ("val", "test"))
    }
    images = LabelledImages.read({"dataset": "custom", "num_workers": 0, **paths}, 16)
    subject = Subject("mine", 0, {"last": load_encoder(run)}, images)
    found = MEASURES["few_labels"](subject, [0.5], epochs=1, subset_files=[str(tmp_path / "list.txt")])
    assert values(found)["labelled_images"] == 3
    assert found.about == f"50 % of the labels: those in {tmp_path}/list.txt"


def test_an_mlp_is_trained_anew_under_each_mask(subject):
    found = MEASURES["random_masking"](subject, [0.5], draws=2, classifiers=["mlp"], protocol="fast")
    masked = [row for row in found.rows if row["metric"] == "masked"]
    assert [(row["rate"], row["draw"]) for row in masked] == [(0.0, 0), (0.5, 0), (0.5, 1)]
    head = MEASURES["accuracy"](subject, ks=[5], protocol="fast", head="mlp")
    assert masked[0]["value"] == values(head)["mlp"] != masked[1]["value"]


def test_cost_of_a_checkpoint_is_refused(subject):
    subject.model = nn.ModuleDict()
    with pytest.raises(UserError, match="measures must be ones of a frozen encoder"):
        MEASURES["cost"](subject)


def test_best_epoch_that_is_the_last_is_measured_once(run):
    pretrained = load_encoder(run)
    subject = Subject("mine", 0, {"last": pretrained, "best": pretrained}, LabelledImages.read(DATA, 16))
    calls = []

    def measure(checkpoint):
        calls.append(checkpoint)
        return [{"metric": "m", "value": 1.0}]

    assert [row["checkpoint"] for row in subject.by_checkpoint(measure)] == ["last", "best"]
    assert calls == ["last"]


HISTORY = "epoch,knn5,knn5_masked\n0,31.0,30.0\n1,,\n2,34.0,33.5\n3,33.0,33.0\n"


def accuracy_of_run(run, knn):
    pretrained = load_encoder(run)
    pretrained.args["evaluation"] = {"knn": knn}
    subject = Subject("mine", 0, {"last": pretrained}, LabelledImages.read(DATA, 16), run)
    return values(MEASURES["accuracy"](subject, ks=[20], protocol=None))


def test_knn_of_the_release_is_that_of_the_best_epoch_masked_where_there_is_a_mask(run):
    (run / "metrics.csv").write_text(HISTORY)
    assert accuracy_of_run(run, {"temperature": None})["knn_release"] == 33.5
    (run / "metrics.csv").write_text(HISTORY.replace("knn5_masked", "knn20_masked"))
    assert accuracy_of_run(run, {"temperature": 1.0})["knn_release"] == 34.0
    assert "knn_release" not in accuracy_of_run(run, {"temperature": 0.07}), "another vote"
    (run / "metrics.csv").write_text("epoch,knn20\n0,31.0\n")
    assert "knn_release" not in accuracy_of_run(run, {"temperature": None}), "another k"


def test_knn_of_the_release_for_a_frozen_checkpoint(subject):
    found = values(MEASURES["accuracy"](subject, ks=[5], protocol=None))
    assert found["knn_release"] == found["knn5_masked"] != found["knn5"]
    subject.encoders["last"] = replace(subject.encoders["last"], mask=None)
    without = values(MEASURES["accuracy"](subject, ks=[5], temperature=0.07, protocol=None))
    assert without["knn_release"] == found["knn5"], "always with T = 1"


def test_masks_among_the_dimensions_below_average_alone(subject):
    found = MEASURES["learned_mask"](subject, rates=[0.5], draws=3, classifier="knn5", protocol="fast")
    assert values(found)["below_average"] == 16
    points = [row for row in found.rows if row["metric"] == "masked"]
    assert [row["rate"] for row in points] == [0.0, 0.5, 0.5, 0.5, 1.0]
    above = subject.features("test").feats[:, 16:]
    assert above.shape[1] == 16 and {"linear", "linear_above_average_only"} < values(found).keys()


def test_an_encoder_without_a_mask_has_no_learned_one(subject):
    subject.encoders["last"] = replace(subject.encoders["last"], mask=None)
    with pytest.raises(UserError, match="encoder must be one with a learned mask, got 'mine'; take a run of"):
        MEASURES["learned_mask"](subject)


def test_random_masks_come_to_their_mean_and_best(subject):
    found = MEASURES["random_masking"](subject, rates=[0.25], draws=5, classifiers=["knn5"])
    points = [row["value"] for row in found.rows if row["metric"] == "masked" and row["rate"] == 0.25]
    unmasked = next(row["value"] for row in found.rows if row["metric"] == "masked" and row["rate"] == 0)
    summary = values(found, rate=0.25)
    assert len(points) == 5 and summary["best"] == max(points) and summary["lowest"] == min(points)
    assert summary["mean"] == pytest.approx(sum(points) / 5)
    assert summary["share_above"] == 100 * sum(point > unmasked for point in points) / 5
