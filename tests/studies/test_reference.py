"""The papers' numbers: grids that mirror the printed tables."""

import re
from pathlib import Path

from metamask_plugin.cli.known import shipped
from metamask_plugin.studies.reference import _shipped, reference

ROOT = Path(__file__).resolve().parents[2]


def value(name, **levels):
    (found,) = [row["value"] for row in reference(None, name) if row | levels == row]
    return found


def test_a_number_is_of_its_row_and_its_columns():
    table1 = {"metric": "mlp", "dataset": "IN-200", "encoder": "fc"}
    assert value("metamask_table1", arm="HCL + MetaMask", **table1) == 41.01
    assert value("metamask_table2", arm="NNCLR", dataset="STL-10") == 71.89
    assert value("icl_msr_table1", arm="W-MSE", dataset="Tiny ImageNet", metric="knn5") == 35.44
    assert value("icl_msr_table4", arm="BYOL + MSR", labels="10 %", metric="finetuned_top5") == 90.7
    assert value("metamask_fig10", arm="w/o drr", encoder="conv", metric="mlp") == 81.61


def test_a_dash_is_no_number():
    rows = reference(None, "icl_msr_table3")
    assert {row["metric"] for row in rows if row["arm"] == "SwAV"} == {"linear"}


def test_a_study_has_the_numbers_that_both_papers_give_for_it():
    metrics = {row["metric"] for row in reference(None, "comparison")}
    assert metrics == {"knn_release", "linear"}


def test_a_study_may_take_those_of_another_or_bring_its_own():
    assert reference("metamask_table4", "mine") == reference(None, "metamask_table4") != []
    assert reference({"columns": {"metric": ["a", "b"]}, "arm": {"x": [1, None]}}, "mine") == [
        {"arm": "x", "metric": "a", "value": 1}
    ]
    assert reference(None, "mine") == []


def test_every_grid_is_of_a_study():
    assert set(_shipped()) <= set(shipped("study"))


def test_the_claims_count_what_the_tables_have():
    """54 of 56 numbers of Table 1, and Table 2's exceptions."""
    for name, worse in (
        ("metamask_table1", {("HCL", "IN-200", "fc"), ("CMC", "CIFAR-100", "conv")}),
        ("metamask_table2", {("BYOL", "CIFAR-10", None), ("NNCLR", "IN-200", None), ("HCL", "IN-200", None)}),
    ):
        rows = reference(None, name)
        numbers = {(row["arm"], row["dataset"], row.get("encoder")): row["value"] for row in rows}
        gains = {
            (arm, *place): numbers[f"{arm} + MetaMask", place[0], place[1]] - number
            for (arm, *place), number in numbers.items()
            if (f"{arm} + MetaMask", *place) in numbers
        }
        assert {key for key, gain in gains.items() if gain < 0} == worse
        # of Table 2 one, SimCLR on CIFAR-10, is the release's arm's
        assert len(gains) == {"metamask_table1": 56, "metamask_table2": 19}[name]


ACCURACY = re.compile(r"(?<![\d.+-])\d\d\.\d\d(?![\d%])")


def test_what_docs_and_headers_quote_of_the_papers_is_in_the_reference():
    known = {f"{row['value']:.2f}" for name in _shipped() for row in reference(None, name)}
    page = (ROOT / "docs" / "results.md").read_text()
    against = page[page.index("## Against the papers") : page.index("## All methods on CIFAR-10")]
    quoted = [line.split("|")[3] for line in against.splitlines() if line.startswith("| ")]
    same_time = page[page.index("### The same processor time") : page.index("## ResNet-18 on a GPU")]
    quoted += [line.split("|")[-2] for line in same_time.splitlines() if line.startswith("| ")]
    headers = [
        line
        for path in (ROOT / "scripts").rglob("*.yaml")
        for line in path.read_text().splitlines()
        if line.startswith("#")
    ]
    numbers = {number for text in [*quoted, *headers] for number in ACCURACY.findall(text)}
    assert {"86.01", "92.34", "79.09", "85.79"} <= numbers
    assert numbers <= known, numbers - known
