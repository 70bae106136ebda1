"""Tables: which number stands where, how it is written, what is marked; the files of rows; the verdicts."""

import csv
import json

import pytest

from metamask_plugin.errors import UserError
from metamask_plugin.studies.metric_names import metric_name, number
from metamask_plugin.studies.statistics import paired, summarise
from metamask_plugin.studies.tables import markdown, tables, write_rows
from metamask_plugin.studies.verdicts import verdicts

FACTORS = ["dataset", "arm"]
PAPER = [
    {"dataset": "A", "arm": "SimCLR", "metric": "knn200", "value": 81.73},
    {"dataset": "A", "arm": "SimCLR", "metric": "linear", "value": 1.0},
]


def rows(seeds=(5, 6, 7)):
    found = []
    for d, dataset in enumerate("AB"):
        for a, arm in enumerate(("SimCLR", "MetaMask")):
            for seed in seeds:
                kind = {"dataset": dataset, "arm": arm, "seed": seed}
                for c, checkpoint in enumerate(("last", "best")):
                    value = 50.0 + 10 * d + (2 + 0.1 * seed) * a + c + seed
                    found.append({**kind, "checkpoint": checkpoint, "metric": "knn200", "value": value})
                found.append({**kind, "checkpoint": "last", "metric": "parameters", "value": 13.0e6})
                found.append({**kind, "checkpoint": "last", "metric": "epochs", "value": 800.0})
    return found


def doubtful():
    """Baseline a; b has p = 0.040 on its own, c 0.74, d 0.0033."""
    values = {"a": (0, 0, 0), "b": (1.0, 1.4, 2.0), "c": (-1.0, 0.0, 1.7), "d": (3.0, 3.2, 3.6)}
    return [
        {"arm": arm, "seed": seed, "checkpoint": "last", "metric": "knn200", "value": value}
        for arm, of_seeds in values.items()
        for seed, value in enumerate(of_seeds)
    ]


def texts(table):
    return {label: [cell.text for cell in cells] for label, cells in table.rows}


def test_rows_and_columns_by_factor_and_a_table_for_each_checkpoint():
    layout = {"rows": "arm", "columns": ["dataset"], "metric": "knn200"}
    last, best = tables(layout, summarise(rows(), FACTORS), PAPER, FACTORS)
    assert last.title == "kNN, k = 200, last epoch" and best.title == "kNN, k = 200, best epoch"
    assert last.corner == "arm" and last.header == ((("A", 1), ("B", 1)),)
    # seeds 5, 6, 7: the standard deviation is 1, and half of the interval 4.3027 / sqrt(3)
    assert texts(last)["SimCLR"] == ["56.00 ± 2.48 (3)", "66.00 ± 2.48 (3)"]
    assert texts(last)["MetaMask"] == ["58.60 ± 2.73 (3)", "68.60 ± 2.73 (3)"]
    assert texts(best)["SimCLR"][0] == "57.00 ± 2.48 (3)"


def test_the_papers_number_stands_beside_ours_and_the_best_of_a_column_is_marked():
    layout = {"rows": "arm", "columns": ["dataset"], "metric": "knn200", "checkpoint": "last"}
    (table,) = tables(layout, summarise(rows(), FACTORS), PAPER, FACTORS)
    papers = {label: [cell.paper for cell in cells] for label, cells in table.rows}
    assert papers == {"SimCLR": ["81.73", None], "MetaMask": [None, None]} and table.has_paper
    assert {label: [c.marked for c in cells] for label, cells in table.rows} == {
        "SimCLR": [False, False],
        "MetaMask": [True, True],
    }


def test_several_metrics_are_the_innermost_columns_and_costs_are_not_marked():
    layout = {"rows": "arm", "columns": ["dataset"], "metrics": ["knn200", "parameters", "epochs", "linear"]}
    last, best = tables(layout, summarise(rows(), FACTORS), (), FACTORS)
    assert last.header == (
        (("A", 3), ("B", 3)),
        tuple((name, 1) for name in ("kNN, k = 200", "parameters", "epochs") * 2),
    )
    assert texts(last)["SimCLR"][1:3] == ["13.00 M (3)", "800 (3)"]
    assert not any(cell.marked for _, cells in last.rows for cell in cells[1:3])
    assert len(best.rows[0][1]) == 2, "only the accuracy is of the best epoch, too"


def test_what_the_layout_does_not_name_makes_tables_of_its_own():
    layout = {"rows": "arm", "metric": "knn200", "checkpoint": "last", "title": "Accuracy"}
    found = tables(layout, summarise(rows(), FACTORS), (), FACTORS)
    assert [table.title for table in found] == [f"Accuracy, dataset {d}, last epoch" for d in "AB"]
    assert texts(found[1]) == {"SimCLR": ["66.00 ± 2.48 (3)"], "MetaMask": ["68.60 ± 2.73 (3)"]}


def test_levels_that_two_columns_share_are_named_in_full():
    shared = [
        {
            "arm": "a",
            "trained on": t,
            "tested on": u,
            "seed": 5,
            "checkpoint": "last",
            "metric": "knn5",
            "value": 1.0,
        }
        for t in ("full", "fore")
        for u in ("full", "fore")
    ]
    layout = {"rows": "arm", "columns": ["trained on", "tested on"], "metric": "knn5"}
    (table,) = tables(layout, summarise(shared, ["arm", "trained on"]))
    assert table.header == (
        (("trained on full", 2), ("trained on fore", 2)),
        (("tested on full", 1), ("tested on fore", 1)) * 2,
    )


def test_numbers_are_in_order_and_gaps_are_dashes():
    part = [
        {"alpha": alpha, "arm": arm, "seed": 5, "checkpoint": "last", "metric": "knn5", "value": value}
        for alpha, arm, value in ((100, "a", 2.0), (0.1, "a", 1.0), (10, "b", 3.0), (1, "b", None))
    ]
    (table,) = tables(
        {"rows": "alpha", "columns": ["arm"], "metric": "knn5"}, summarise(part, ["alpha", "arm"])
    )
    assert texts(table) == {"0.1": ["1.00", "–"], "1": ["–", "–"], "10": ["–", "3.00"], "100": ["2.00", "–"]}


def test_differences_have_signs_and_marks_where_they_are_clear():
    pairs = paired(rows(), FACTORS, {"arm": "SimCLR"})
    layout = {"rows": "arm", "columns": ["dataset"], "metric": "knn200", "checkpoint": "last"}
    (table,) = tables(layout, pairs, PAPER, FACTORS)
    assert table.differences and not table.has_paper
    assert texts(table) == {"MetaMask": ["+2.60 ± 0.25 (3)"] * 2}
    assert all(cell.marked for _, cells in table.rows for cell in cells)
    (alone,) = tables(layout, paired(rows([5]), FACTORS, {"arm": "SimCLR"}), (), FACTORS)
    assert texts(alone) == {"MetaMask": ["+2.50"] * 2}
    assert not any(cell.marked for _, cells in alone.rows for cell in cells)
    # an interval that leaves 0 out is no mark: three comparisons are three chances
    (many,) = tables({"rows": "arm", "metric": "knn200"}, paired(doubtful(), ["arm"], {"arm": "a"}))
    assert [cells[0].marked for _, cells in many.rows] == [False, False, True]


def test_without_numbers_there_are_no_tables():
    assert tables({"rows": "arm", "columns": ["tested on"], "metric": "knn5"}, [], (), ["arm"]) == []


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"rows": "arms", "metric": "knn5"}, "tables must be one of .*'arms'; did you mean 'arm'"),
        ({"metric": "knn5"}, "tables must be given with rows"),
        ({"rows": "arm"}, "tables must be given with a metric"),
        ({"rows": "arm", "metric": "knn5", "colums": ["dataset"]}, "tables must be given by .*'colums'"),
    ],
)
def test_a_layout_of_what_is_not_there_is_one_line(layout, message):
    with pytest.raises(UserError, match=message) as error:
        tables(layout, summarise(rows(), FACTORS), (), FACTORS)
    assert "\n" not in str(error.value)


def test_what_a_run_has_once_is_in_no_epochs_name():
    last = [
        row for row in rows() if (row["dataset"], row["checkpoint"], row["metric"]) == ("A", "last", "knn200")
    ]
    found = [{**row, "metric": "knn_release"} for row in last]
    layout = {"rows": "arm", "metric": "knn_release"}
    (table,) = tables(layout, summarise(found, FACTORS), (), FACTORS)
    assert table.title == "kNN of the release: k = 5, T = 1, masked, best epoch"
    knn5 = [{**row, "metric": "knn5"} for row in found]
    (table,) = tables(
        {"rows": "arm", "metrics": ["knn_release", "knn5"]}, summarise([*found, *knn5], FACTORS), (), FACTORS
    )
    assert table.title == "Results, last epoch"
    assert table.header == ((("kNN of the release", 1), ("kNN, k = 5", 1)),)


def test_markdown_has_the_marks_and_escapes_what_would_break_the_table():
    named = [
        {**row, "arm": row["arm"].replace("SimCLR", "a | b\nc")}
        for row in rows()
        if row["metric"] == "knn200"
    ]
    layout = {"rows": "arm", "columns": ["dataset"], "metric": "knn200", "checkpoint": "last"}
    paper = [{"arm": "MetaMask", "dataset": "B", "metric": "knn200", "value": 1}]
    (table,) = tables(layout, summarise(named, FACTORS), paper, FACTORS)
    assert markdown(table).splitlines() == [
        "kNN, k = 200, last epoch",
        "",
        "| arm | A | B |",
        "| --- | --- | --- |",
        "| a \\| b c | 56.00 ± 2.48 (3) | 66.00 ± 2.48 (3) |",
        "| MetaMask | **58.60 ± 2.73 (3)** | **68.60 ± 2.73 (3)** (paper 1.00) |",
    ]


def test_numbers_and_names():
    assert [number(v, "knn5") for v in (100.0, 7.125)] == ["100.00", "7.12"]
    assert number(11173962.0, "parameters") == "11.17 M"
    assert number(512.0, "parameters") == "512" and number(2400.0, "epochs") == "2,400"
    assert number(0.01234, "feature_std") == "0.0123"
    assert number(46.2, "effective_rank", sign=True) == "+46.20"
    assert metric_name("knn20_masked") == "kNN, k = 20, masked"
    assert metric_name("linear_top5") == "linear probe, top 5"
    assert metric_name("effective_rank") == "effective rank"
    assert metric_name("linear_above_average_only") == "linear probe, dimensions above average alone"
    assert number(16.0, "linear_above_average_only") == number(16.0, "unmasked") == "16.00"


def test_rows_are_written_with_the_union_of_their_columns(tmp_path):
    write_rows(
        [*rows([5])[:1], {"arm": 'x, "y"', "seed": 6, "rate": 0.5, "value": float("nan")}], tmp_path / "new"
    )
    with (tmp_path / "new" / "results.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert first == {
        "dataset": "A",
        "arm": "SimCLR",
        "seed": "5",
        "checkpoint": "last",
        "metric": "knn200",
        "value": "55.0",
        "rate": "",
    }
    assert second["arm"] == 'x, "y"' and second["rate"] == "0.5" and second["metric"] == ""
    written = json.loads((tmp_path / "new" / "results.json").read_text())["rows"]
    assert written[0] == rows([5])[0] and written[1]["value"] is None
    write_rows([], tmp_path / "empty")
    assert (tmp_path / "empty" / "results.csv").read_text() == "seed,checkpoint,metric,value\n"


def test_a_verdict_counts_and_names_what_is_clear():
    pairs = paired(rows(), FACTORS, {"arm": "SimCLR"})
    assert verdicts(pairs, {"arm": "SimCLR"}, ["knn200"]) == [
        "kNN, k = 200, last epoch: 2 of 2 differences to arm = SimCLR are clear after the correction for "
        "2 comparisons, 2 above and 0 below: "
        "A, MetaMask +2.60 [+2.35, +2.85], n = 3; B, MetaMask +2.60 [+2.35, +2.85], n = 3.",
        # standard deviation 0.1: 5.6535 / sqrt(3) times as much
        "kNN, k = 200, last epoch: 3 seeds find a difference of 0.33 points with a probability of 80 %, "
        "before the correction.",
    ]
    alone = verdicts(paired(rows([5]), FACTORS, {"arm": "SimCLR"}), {"arm": "SimCLR"}, ["knn200", "knn5"])
    assert alone == [
        "kNN, k = 200, last epoch: no verdict on the differences to arm = SimCLR: "
        "fewer than two seeds with both sides."
    ]


def test_a_verdict_calls_clear_what_is_so_after_the_correction_alone():
    first, second = verdicts(paired(doubtful(), ["arm"], {"arm": "a"}), {"arm": "a"})
    assert "1 of 3 differences to arm = a are clear after the correction for 3 comparisons, 1 above" in first
    assert "d +3.27 [" in first and "b +" not in first
    assert "points (d) to" in second and "points (c) with a probability of 80 %" in second


def test_a_verdict_on_one_difference_corrects_nothing():
    two = [row for row in doubtful() if row["arm"] in "ab"]
    first, second = verdicts(paired(two, ["arm"], {"arm": "a"}), {"arm": "a"})
    assert "1 of 1 differences to arm = a are clear, 1 above and 0 below: b +1.47 [" in first
    assert "3 seeds find a difference of 1.64 points with a probability" in second


def test_what_no_seed_changes_has_nothing_to_resolve():
    found = verdicts(paired(rows(), FACTORS, {"arm": "SimCLR"}), {"arm": "SimCLR"}, ["epochs"])
    assert found == [
        "epochs: 0 of 2 differences to arm = SimCLR are clear after the correction for 2 comparisons."
    ]
