"""What single measures find, against what is known of the encoder."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import load_pretrained
from metamask_plugin.evaluation.labelled_data import LabelledData
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
    pretrained = load_pretrained(run)
    data = LabelledData(DATA, 16)
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


def test_cost_of_a_checkpoint_is_refused(subject):
    subject.model = nn.ModuleDict()
    with pytest.raises(UserError, match="measures must be ones of a frozen encoder"):
        MEASURES["cost"](subject)


def test_best_epoch_that_is_the_last_is_measured_once(run):
    pretrained = load_pretrained(run)
    subject = Subject("mine", 0, {"last": pretrained, "best": pretrained}, LabelledData(DATA, 16))
    calls = []

    def measure(checkpoint):
        calls.append(checkpoint)
        return [{"metric": "m", "value": 1.0}]

    assert [row["checkpoint"] for row in subject.by_checkpoint(measure)] == ["last", "best"]
    assert calls == ["last"]


HISTORY = "epoch,knn5,knn5_masked\n0,31.0,30.0\n1,,\n2,34.0,33.5\n3,33.0,33.0\n"


def accuracy_of_run(run, knn):
    pretrained = load_pretrained(run)
    pretrained.args["evaluation"] = {"knn": knn}
    subject = Subject("mine", 0, {"last": pretrained}, LabelledData(DATA, 16), run)
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
