"""Whole runs on a folder with a file that is no image: what the user sees, and what is left behind."""

from pathlib import Path

import pytest
from composing import composed
from image_faults import inject, make_tree
from omegaconf import OmegaConf

from metamask_plugin.cli import knn, linear, pretrain

pytestmark = pytest.mark.fault("data")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def trees(tmp_path):
    return make_tree(tmp_path / "train", images=6), make_tree(tmp_path / "val")


def overrides(tmp_path, trees, *more):
    return [
        "data.dataset=custom",
        "~data.kwargs",
        f"++data.train_path={trees[0]}",
        f"++data.val_path={trees[1]}",
        "++data.num_workers=0",
        "backbone.name=conv4",
        "++backbone.kwargs.width=4",
        "optimizer.batch_size=8",
        "max_epochs=1",
        "scheduler.warmup_epochs=0",
        "accelerator=cpu",
        f"checkpoint.dir={tmp_path / 'runs'}",
        "++evaluation.final_report=False",
        "++evaluation.knn.k=[2]",
        *more,
    ]


def run(*arguments):
    return pretrain.run(composed("pretrain", "metamask_barlow", *overrides(*arguments)))


@pytest.mark.parametrize("fault", ["JPEG cut in half", "dangling link"])
def test_a_run_stops_before_it_leaves_anything(tmp_path, trees, fault, capfd):
    inject(fault, trees[0] / "dog" / "2.jpg")
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, trees)
    assert stopped.value.code == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: image file {trees[0] / 'dog' / '2.jpg'} must be")
    assert not list((tmp_path / "runs").rglob("*.ckpt")) and not list((tmp_path / "runs").rglob("args.json"))


@pytest.mark.parametrize("pipeline", ["torchvision", "kornia"])
def test_a_run_goes_on_where_asked_to(tmp_path, trees, pipeline, capfd):
    inject("JPEG cut in half", trees[0] / "dog" / "2.jpg")
    inject("web page", trees[1] / "cat" / "0.jpg")
    folder = run(tmp_path, trees, "++data.invalid_images=skip", f"++data.pipeline={pipeline}")
    assert folder.last_checkpoint.exists()
    warned = [line for line in capfd.readouterr().err.splitlines() if line.startswith("warning: left out")]
    assert len(warned) == 1 and "left out 2 " in warned[0]


def test_more_neighbours_than_images_are_named_by_what_there_is(tmp_path, trees, capfd):
    folder = run(tmp_path, trees, "evaluation.knn.k=[20,5]")
    assert "warning: evaluation.knn.k=20 is more than the 12 training images" in capfd.readouterr().err
    columns = (folder.path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"knn12", "knn5", "knn12_masked"} <= set(columns) and "knn20" not in columns
    assert (folder.path / "best" / "best.ckpt").exists()
    knn.main(["--pretrained_checkpoint_dir", str(folder.path), "--k", "5000", "--feature_type", "backbone"])
    out, err = capfd.readouterr()
    assert "--k=5000 is more than the 12 training images" in err and "5000" not in out and " 12 " in out


def probe(folder, **data):
    cfg = {
        "name": "probe",
        "pretrained_feature_extractor": str(folder.path),
        "checkpoint": {"dir": str(folder.path.parent / "probes")},
        "accelerator": "cpu",
        "protocol": "custom",
        "optimizer": {"name": "adam", "batch_size": 8, "lr": 0.01},
        "max_epochs": 1,
        "data": data,
    }
    return linear.run(OmegaConf.create(cfg))


def test_evaluators_stop_with_the_same_line(tmp_path, trees, capfd):
    folder = run(tmp_path, trees)
    bad = trees[1] / "cat" / "0.jpg"
    inject("JPEG cut in half", bad)
    capfd.readouterr()
    for evaluate in (
        lambda: knn.main(["--pretrained_checkpoint_dir", str(folder.path), "--k", "1"]),
        lambda: probe(folder),
    ):
        with pytest.raises(SystemExit) as stopped:
            evaluate()
        lines = capfd.readouterr().err.splitlines()
        assert stopped.value.code == 2 and len(lines) == 1
        assert lines[0].startswith(f"error: image file {bad} must be readable, got a truncated file")
    probe(folder, invalid_images="skip")
    assert "left out 1 images that cannot be read" in capfd.readouterr().err
