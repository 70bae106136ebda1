"""``main_knn.py``: its numbers, its defaults, and its one-line errors."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from metamask_plugin.cli.knn import main, parse_args, run
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.encoder import load_encoder
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.knn import knn_accuracies, masked_features
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.modules.encoders import build_encoder

ROOT = Path(__file__).parents[2]


def rows_of(*argv):
    return run(parse_args([str(word) for word in argv]))


def test_the_table_holds_what_the_functions_give(run_folder):
    rows = rows_of("--pretrained_checkpoint_dir", run_folder, "--k", 5, 20, "--temperature", 0.07, 0.2)
    loaded = load_encoder(run_folder)
    data = LabelledImages.read({"dataset": "digits", "kwargs": {"size": 16}}, 16)
    pair = [extract_features(loaded.backbone, data.evaluation_loader(split)) for split in ("train", "test")]
    expected = []
    for kind in ("backbone", "masked"):
        used = pair if kind == "backbone" else [masked_features(split, loaded.mask) for split in pair]
        for temperature in (0.07, 0.2):
            for k, accuracy in knn_accuracies(*used, (5, 20), temperature).items():
                expected.append((kind, f"{temperature:g}", k, accuracy.acc1, accuracy.acc5))
    assert [(r["features"], r["T"], r["k"], r["acc@1"], r["acc@5"]) for r in rows] == expected
    assert rows[0]["acc@1"] > 50, "even random convolutions tell digits apart"
    assert rows[0]["acc@1"] != rows[4]["acc@1"]


def test_euclidean_distance_has_no_temperature_and_a_type_may_be_chosen(run_folder):
    rows = rows_of(
        "--pretrained_checkpoint_dir",
        run_folder,
        "--distance_function",
        "cosine",
        "euclidean",
        "--feature_type",
        "masked",
    )
    assert {row["features"] for row in rows} == {"masked"}
    assert [row["T"] for row in rows] == ["1", "0.07", "0.07", None, None, None]
    assert [row["distance"] for row in rows] == ["cosine"] * 3 + ["euclidean"] * 3
    assert [row["k"] for row in rows] == [5, 20, 200] * 2


def test_without_a_mask_there_are_backbone_rows_only(run_folder):
    path = run_folder / "last.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    del state["mask.weight"]
    torch.save({"state_dict": state}, path)
    rows = rows_of("--pretrained_checkpoint_dir", run_folder, "--k", 5)
    assert [row["features"] for row in rows] == ["backbone"]
    with pytest.raises(UserError, match="--feature_type must be backbone, as metamask has no mask"):
        rows_of("--pretrained_checkpoint_dir", run_folder, "--feature_type", "masked")


def test_without_args_json_the_flags_say_it_all(run_folder):
    flags = ["--pretrained_checkpoint_dir", run_folder, "--k", 5, "--dataset", "digits", "--crop_size", 16]
    known = rows_of(*flags)
    (run_folder / "args.json").unlink()
    with pytest.raises(UserError, match="backbone.name must be given.*--backbone"):
        rows_of(*flags)
    with pytest.raises(UserError, match=r"layers.0.weight is \(4, 3, 3, 3\) in the checkpoint"):
        rows_of(*flags, "--backbone", "conv4")  # of the default width
    state = {f"backbone.{key}": value for key, value in build_encoder("conv4", 16).state_dict().items()}
    torch.save({"state_dict": state}, run_folder / "last.ckpt")
    (row,) = rows_of(*flags, "--backbone", "conv4")
    assert row["acc@1"] > 50
    assert row["acc@1"] != known[0]["acc@1"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--feature_type", "projector"], "the encoder's features"),
        (["--distance_function", "cos"], "did you mean 'cosine'"),
        (["--k", "0"], "--k must be >= 1, got 0"),
        (["--temperature", "-1"], "--temperature must be > 0"),
        (["--batch_size", "0"], "--batch_size must be >= 1"),
        (["--data_format", "h5"], "image_folder or dali"),
        (["--dataset", "digit"], "data.dataset must be one of"),
        (["--dataset", "cifar10", "--train_data_path", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_flags_end_with_one_line_and_code_2(run_folder, flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["--pretrained_checkpoint_dir", str(run_folder), *flags])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_the_script_prints_a_table_and_exits_with_0(run_folder):
    command = [sys.executable, str(ROOT / "main_knn.py"), "--pretrained_checkpoint_dir", str(run_folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run_folder)
    assert done.returncode == 0, done.stderr
    assert "500 test images against 1297 of the bank" in done.stdout
    assert [line.split()[3] for line in done.stdout.splitlines() if line.startswith("masked")] == [
        "5",
        "20",
        "200",
    ]
    assert "Traceback" not in done.stderr
