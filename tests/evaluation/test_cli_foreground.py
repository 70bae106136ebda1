"""``main_foreground.py``: its numbers against the functions', its files, and its one-line errors."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from refusals import refused

from metamask_plugin.cli import foreground
from metamask_plugin.cli.foreground import main, parse_args, run
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.regions import region_accuracies
from metamask_plugin.modules.encoders import build_encoder

ROOT = Path(__file__).parents[2]
DATA = {"dataset": "confounded_digits", "num_workers": 0, "kwargs": {"size": 16}}


def write_run(folder, name, seed, region=None, **data):
    """``last.ckpt`` and ``args.json`` of an untrained encoder of 64 dimensions."""
    torch.manual_seed(seed)
    weights = build_encoder("conv4", 16, width=8).state_dict()
    folder.mkdir()
    torch.save(
        {"state_dict": {f"backbone.{key}": value for key, value in weights.items()}}, folder / "last.ckpt"
    )
    args = {
        "name": name,
        "seed": seed,
        "method": "icl_msr",
        "backbone": {"name": "conv4", "kwargs": {"width": 8}},
        "augmentations": [{"crop_size": 16, "num_crops": 2}],
        "data": {**DATA, **({"region": region} if region else {}), **data},
    }
    (folder / "args.json").write_text(json.dumps(args))
    return folder


@pytest.fixture
def runs(tmp_path):
    """Two seeds trained on full images, one on foregrounds."""
    return [
        write_run(tmp_path / "full-1", "SimCLR", 1),
        write_run(tmp_path / "full-2", "SimCLR", 2),
        write_run(tmp_path / "foreground-1", "SimCLR", 1, region="foreground", region_form="fill"),
    ]


def summary_of(*argv):
    return run(parse_args(["--pretrained_checkpoint_dir", *[str(word) for word in argv]]))


def test_rows_hold_what_the_functions_give_and_seeds_are_averaged(runs, tmp_path, capsys):
    summary = summary_of(*runs, "--protocol", "none", "--output", tmp_path / "out")
    data, expected = LabelledImages.read(DATA, 16), []
    for folder, trained_on in zip(runs, ("full", "full", "foreground")):
        encoder = load_encoder(folder).backbone
        images = lambda split, region: data.evaluation_loader(split, region=region)  # noqa: E731
        expected += region_accuracies(encoder, images, trained_on, protocol=None)
    found = summary["runs"]
    assert [(row["tested on"], row["knn5"]) for row in found] == [
        (row["tested on"], row["knn5"]) for row in expected
    ]
    assert [(row["seed"], row["trained on"]) for row in found[::3]] == [
        (1, "full"),
        (2, "full"),
        (1, "foreground"),
    ]
    assert [row["setting"] for row in found] == [1, 2, None, 1, 2, None, 4, 3, None]
    first = summary["summary"][0]
    assert (first["n"], first["knn5"]) == (2, pytest.approx((found[0]["knn5"] + found[3]["knn5"]) / 2))
    assert len(summary["summary"]) == 6
    printed = capsys.readouterr().out
    assert printed.count("500 test and 1297 training images") == 1, "the data are loaded once"
    assert f"{first['knn5']:.2f} ± {first['knn5_std']:.2f}" in printed
    assert "linear" not in printed.split("setting: ")[0]
    assert json.loads((tmp_path / "out" / "foreground.json").read_text()) == summary
    assert Image.open(tmp_path / "out" / "foreground.png").width > 600


def test_the_probe_the_neighbours_and_what_they_are_fitted_on_may_be_chosen(runs, monkeypatch, tmp_path):
    asked = []

    def recorded(backbone, images, *args, **kwargs):
        asked.append((args, kwargs["protocol"], images.args[1]))
        return [{"tested on": "full", "knn3": 10.0, "linear": 20.0}]

    monkeypatch.setattr(foreground, "region_accuracies", recorded)
    flags = ["--k", 3, "--protocol", "fast", "--fit_on", "tested", "--form", "zoom", "--output", tmp_path]
    summary = summary_of(runs[2], *flags)
    assert asked == [(("foreground", "tested", 3), "fast", "zoom")]
    assert summary["runs"][0]["linear"] == 20


def test_foregrounds_are_shown_as_the_runs_were_trained_on_them(runs, tmp_path):
    zoomed = write_run(tmp_path / "zoomed", "BYOL", 1, region="foreground", region_form="zoom")
    summary = summary_of(runs[0], zoomed, "--protocol", "none", "--output", tmp_path)
    assert summary["form"] == "zoom"
    with pytest.raises(ValueError, match="--form must be given, as the runs were trained on different ones"):
        summary_of(runs[2], zoomed, "--output", tmp_path)


def test_one_run_has_its_results_beside_it_and_a_table_of_its_own(runs, capsys):
    summary_of(runs[0], "--protocol", "fast", "--names", "mine")
    printed = capsys.readouterr().out
    header, _, *rows = printed[printed.index("name ") :].splitlines()[:5]
    assert header.split() == ["name", "seed", "trained", "on", "tested", "on", "setting", "knn5", "linear"]
    assert [row.split()[:5] for row in rows] == [
        ["mine", "1", "full", "full", "1"],
        ["mine", "1", "full", "foreground", "2"],
        ["mine", "1", "full", "background", "-"],
    ]
    assert (runs[0] / "foreground.png").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--fit_on", "both"], "--fit_on must be one of tested, trained"),
        (["--protocol", "papers"], "did you mean 'paper'"),
        (["--form", "crop"], "--form must be one of fill, zoom"),
        (["--k", "0"], "--k must be >= 1, got 0"),
        (["--batch_size", "0"], "--batch_size must be >= 1"),
        (["--dataset", "digits"], "data set digits must be one with foreground boxes"),
        (["--names", "a", "b"], "--names must be 1, one for each run, got 2"),
        (["--output", __file__], "--output must be a folder that can be written"),
    ],
)
def test_bad_flags_end_with_one_line_and_code_2(runs, flags, message, capsys):
    words = ["--pretrained_checkpoint_dir", str(runs[0]), *flags]
    assert message in refused(lambda: main(words), capsys, alone=True)


def test_runs_that_cannot_be_compared_are_named(runs, tmp_path, capsys):
    digits = write_run(tmp_path / "digits", "SimCLR", 3, dataset="digits")
    other = write_run(tmp_path / "other", "SimCLR", 3, kwargs={"size": 16, "correlation": 0.9})
    again = write_run(tmp_path / "again", "SimCLR", 1)
    unknown = write_run(tmp_path / "unknown", "SimCLR", 4, region="middle")
    bare = write_run(tmp_path / "bare", "SimCLR", 5)
    (bare / "args.json").unlink()
    for folders, message in (
        ([runs[0], runs[0] / "last.ckpt"], "must be different runs"),
        ([runs[0], digits], "must be runs on one data set, got ['confounded_digits', 'digits']"),
        ([runs[0], other], "'SimCLR' trained on full images must be trained on the same data"),
        (
            [runs[0], again],
            "must be of different seeds, got [1, 1]; give different methods different --names",
        ),
        ([unknown], "data.region of"),
        ([bare], "args.json beside"),
        ([tmp_path / "nowhere"], "nowhere"),
    ):
        words = ["--pretrained_checkpoint_dir", *map(str, folders)]
        assert message in refused(lambda words=words: main(words), capsys, alone=True)


def test_the_script_prints_means_over_seeds_and_writes_into_foreground(runs, monkeypatch, capsys):
    command = ["main_foreground.py", "--pretrained_checkpoint_dir", *map(str, runs[:2]), "--protocol", "none"]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(runs[0].parent)
    # in this process: a fresh one spends its time on imports
    runpy.run_path(str(ROOT / "main_foreground.py"), run_name="__main__")
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("SimCLR")]
    assert [(row[1:5], row[6]) for row in rows] == [
        (["full", "full", "1", "2"], "±"),
        (["full", "foreground", "2", "2"], "±"),
        (["full", "background", "-", "2"], "±"),
    ]
    written = {path.name for path in (runs[0].parent / "foreground").iterdir()}
    assert written == {"foreground.json", "foreground.png"}
