"""Rows against the functions they stand for, the table's layout, and the summary file."""

import json
import os

import numpy as np
import pytest
import torch
from torch import nn

from metamask_plugin.audit.statistics import standard_error
from metamask_plugin.evaluation.features import extract_features, raw_pixels
from metamask_plugin.evaluation.knn import knn_accuracies, knn_hits, masked_features
from metamask_plugin.evaluation.linear import PROTOCOLS, LinearProtocol, linear_probe
from metamask_plugin.evaluation.report import (
    errors_in_words,
    evaluate_rows,
    evaluation_in_words,
    format_table,
    without_errors,
    write_summary,
)

PROBE = LinearProtocol("adam", lr=1e-2, epochs=3, batch_size=32)


class Data:
    """Three classes of noisy patterns."""

    def evaluation_loader(self, split, batch_size=256):
        patterns = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
        generator = torch.Generator().manual_seed({"train": 0, "test": 1}[split])
        count = {"train": 60, "test": 30}[split]
        y = torch.arange(count) % 3
        x = patterns[y] + 4 * torch.randn(count, 3, 16, 16, generator=generator)
        return list(zip(x.split(16), y.split(16)))


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(768, 6))


def test_rows_hold_what_the_functions_give(encoder):
    mask, said = torch.tensor([0.0, 1, 2, 1, 0, 1]), []
    rows = evaluate_rows(
        Data(), {"trained": encoder}, {"trained": mask}, ks=(5, 20), protocol=PROBE, seed=3, say=said.append
    )
    assert [row["features"] for row in rows] == ["raw pixels", "trained", "trained, masked"] == said
    assert [row["dim"] for row in rows] == [768, 6, 6]
    pixels = [raw_pixels(Data().evaluation_loader(split)) for split in ("train", "test")]
    feats = [extract_features(encoder, Data().evaluation_loader(split)) for split in ("train", "test")]
    masked = [masked_features(split, mask) for split in feats]
    for row, (train, test) in zip(rows, (pixels, feats, masked)):
        found = knn_accuracies(train, test, (5, 20))
        assert [row["knn5"], row["knn20"]] == [found[5].acc1, found[20].acc1]
    assert rows[1]["linear"] == linear_probe(*feats, 3, PROBE, seed=3).acc1_last
    assert rows[2]["linear_best"] == linear_probe(*feats, 3, PROBE, seed=3, mask=mask).acc1_best
    assert rows[0]["knn20"] > 40, "the patterns should be visible in the pixels"


def test_standard_errors_are_in_the_rows_over_originals_and_not_in_the_table(encoder):
    settings = {"pixels": False, "ks": (20, 5), "protocol": PROBE}
    (row,) = evaluate_rows(Data(), {"a": encoder}, **settings)
    assert row["knn20_standard_error"] == pytest.approx((row["knn20"] * (100 - row["knn20"]) / 29) ** 0.5)
    assert row["linear_standard_error"] == pytest.approx((row["linear"] * (100 - row["linear"]) / 29) ** 0.5)
    originals = torch.arange(30) % 15
    (over,) = evaluate_rows(Data(), {"a": encoder}, **settings, originals=originals)
    train, test = (extract_features(encoder, Data().evaluation_loader(split)) for split in ("train", "test"))
    right = knn_hits(train, test, (20,))[20][:, 0]
    assert over["knn20_standard_error"] == standard_error(right, originals) != row["knn20_standard_error"]
    assert over["linear_standard_error"] != row["linear_standard_error"]
    assert without_errors([over]) == without_errors([row])
    assert [key for key in over if "error" in key] == ["knn20_standard_error", "linear_standard_error"]
    assert "standard" not in format_table(without_errors([over]))
    largest = max(over["knn20_standard_error"], over["linear_standard_error"])
    words = f"One standard error of a single accuracy, over 15 originals: at most {largest:.1f} points."
    assert errors_in_words([over], originals) == words
    assert "over test images:" in errors_in_words([row], None)


def test_rows_without_pixels_probe_or_mask(encoder):
    rows = evaluate_rows(Data(), {"a": encoder}, {"a": None}, pixels=False, ks=(5,), protocol=None)
    assert [list(row) for row in rows] == [["features", "dim", "knn5", "knn5_standard_error"]]


def test_the_mlp_has_a_column_of_its_name(encoder):
    (row,) = evaluate_rows(Data(), {"a": encoder}, pixels=False, ks=(5,), protocol=PROBE, head="mlp")
    assert {"mlp", "mlp_best"} < set(row)


def test_the_table_is_aligned_and_fits_the_width():
    rows = [
        {"features": "raw pixels", "dim": 3072, "knn20": 41.2, "linear": 30.0},
        {"features": "a name that is far too long for one line", "dim": 8, "knn20": 100.0, "knn5": None},
    ]
    table = format_table(rows, width=50)
    assert table.splitlines() == [
        "features                 dim   knn20  linear  knn5",
        "-" * 50,
        "raw pixels              3072   41.20   30.00     -",
        "a name that is far to…     8  100.00       -     -",
    ]
    assert format_table([]) == "(no rows)"


def test_the_default_table_of_an_evaluation_fits_80_columns():
    row = {"features": "random initialisation, masked", "dim": 2048}
    row.update(dict.fromkeys(("knn5", "knn20", "knn200", "linear", "linear_best"), 100.0))
    table = format_table([row])
    assert max(map(len, table.splitlines())) <= 80
    assert "random initialisation, masked" in table


def test_the_summary_is_plain_json_and_replaces_the_old_one_whole(tmp_path):
    path = tmp_path / "new" / "summary.json"
    write_summary(path, {"old": 1})
    write_summary(
        path,
        {
            "t": torch.tensor([1.0, 2.0]),
            "n": np.float32(0.5),
            "bad": float("nan"),
            5: (1, None, True),
            "p": path,
        },
    )
    assert json.loads(path.read_text()) == {
        "t": [1, 2],
        "n": 0.5,
        "bad": None,
        "5": [1, None, True],
        "p": str(path),
    }
    assert os.listdir(path.parent) == ["summary.json"]
    assert path.stat().st_mode & 0o444 == 0o444


def test_an_interrupted_write_leaves_the_old_summary(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_summary(path, {"old": 1})

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_summary(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["summary.json"]


def test_a_table_says_how_its_numbers_come_about():
    said = evaluation_in_words([5, 20, 200], None, PROTOCOLS["paper"])
    assert "T = 1 (k = 5), 0.07 (k = 20, 200)" in said and "standardised features, 500 epochs" in said
    assert "T = 0.2 (k = 5, 20)" in evaluation_in_words([5, 20], 0.2, PROTOCOLS["paper"])
    assert "features of unit length" in evaluation_in_words([5], None, PROTOCOLS["icl_msr"])
