"""The table of targets, from files as the benchmarks write them."""

import json

import pytest
import step_cost
from claims import claims
from iterations import RELEASE
from peers import UNIT
from run_all import Job, jobs, main, run


def put(out, folder, name, device, record):
    (out / folder).mkdir(parents=True)
    (out / folder / f"{name}.json").write_text(json.dumps({"hardware": {"device": device}, **record}))


def ratio(value):
    return {"median": value, "low": value, "high": value}


def steps(out, device, folder="step_cost", **ratios):
    full = {
        "ratio": {name: ratio(value) for name, value in ratios.items()},
        "seconds": {RELEASE: [4.0, 8.0, 4.0], "exact, k = 1": [1.0, 4.0, 1.0]},
    }
    cell = {"backbone": "resnet18", "batch": 16, "precision": "bf16", "full": full}
    cell["meta"] = {"ratio": {"exact": ratio(3.3)}}
    put(out, folder, "step_cost", device, {"settings": {"compile": False}, "cells": [cell]})


def by_wanted(out):
    return {claim.wanted: (claim.measured, claim.met) for claim in claims(out)}


def test_nothing_measured_claims_nothing(tmp_path):
    assert claims(tmp_path) == []


def test_step_costs_on_the_cpu(tmp_path):
    steps(tmp_path, "CPU, x86_64", **{"exact, k = 4": 1.7, "exact, k = 8": 9.0})
    assert by_wanted(tmp_path) == {"at most 3.2": ("3.30", "no"), "at most 1.9": ("1.70", "yes")}


def test_step_costs_on_a_gpu(tmp_path):
    steps(tmp_path, "NVIDIA H200", **{"exact, k = 1": 3.7, "exact, k = 4": 1.7, "exact, k = 8": 1.2})
    assert by_wanted(tmp_path) == {
        "at most 3.4": ("3.70", "no"),
        "at most 1.7": ("1.70", "yes"),
        "at most 1.35": ("1.20", "yes"),
        "at least 3": ("4.00", "yes"),  # the median of 4, 2 and 4: within a round
    }


def test_epochs_memory_and_pipelines(tmp_path):
    settings = {"backbone": "resnet18", "batch": 512, "precision": "bf16"}
    row = {
        "hours_of_800_epochs": 1.2,
        "compiled": True,
        "share_of_matrix_peak": 0.31,
        "data_wait_share": 0.02,
    }
    epochs = {UNIT: row, "MetaMask, k = 8": {**row, "hours_of_800_epochs": 0.9}}
    put(tmp_path, "epoch_time", "epoch_time", "NVIDIA H200", {"settings": settings, "epochs": epochs})
    peaks = {"meta": {"exact": {"ratio": 1.4}}, "full": {"exact": {"ratio": 2.1}}}
    put(tmp_path, "peak_memory", "peak_memory", "NVIDIA H200", {"cells": [{**settings, **peaks}]})
    cases = {"cifar": {"ratio_on_the_same_cores": {"kornia, 2 cores": ratio(2.4), "DALI": ratio(9)}}}
    put(tmp_path, "input_pipelines", "input_pipelines", "CPU", {"cases": cases})
    unit, meta, meta_step, iteration, kornia = claims(tmp_path)
    assert (unit.measured, unit.met) == ("1.20", "-")
    assert (meta.measured, meta.met) == ("0.90", "yes")
    for part in ("31% of the matrix peak", "2.0% waiting", "bf16, compiled"):
        assert part in meta.what
    assert (meta_step.measured, meta_step.met) == ("1.40", "yes")
    assert (iteration.measured, iteration.met) == ("2.10", "no")
    assert (kornia.wanted, kornia.measured, kornia.met) == ("at least 2", "2.40", "yes")


@pytest.mark.parametrize("kind", ["cuda", "cpu", "smoke"])
def test_every_job_is_a_script_that_understands_its_arguments(kind):
    found = jobs(kind)
    assert found[0].name == "step_cost" and len({job.name for job in found}) == len(found)
    for job in found:
        assert job.command[0].removesuffix(".py") in (
            "step_cost",
            "peak_memory",
            "epoch_time",
            "input_pipelines",
            "scaling",
        )
        if job.command[0] == "step_cost.py":
            assert step_cost.parse(job.command[1:]).compile == job.name.endswith("compiled")


def test_one_that_fails_or_does_not_end_is_named(tmp_path):
    (tmp_path / "fails.py").write_text("print('before'); raise SystemExit('reason')")
    (tmp_path / "sleeps.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    assert run(Job("a", [str(tmp_path / "fails.py")], 1), tmp_path, 30).startswith(
        "failed, exit code 1: reason"
    )
    assert run(Job("b", [str(tmp_path / "sleeps.py")], 1), tmp_path, 1).startswith("stopped after 1 s")
    assert (tmp_path / "a" / "output.txt").read_text() == "before\nreason\n"


def test_without_time_nothing_is_begun(tmp_path, capsys):
    assert main(["--smoke", "--minutes", "0", "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("not begun: no time was left") == 3


@pytest.mark.slow
def test_everything_runs_at_the_smallest_sizes(tmp_path):
    assert main(["--smoke", "--minutes", "6", "--out", str(tmp_path)]) == 0
    text = (tmp_path / "summary.md").read_text()
    assert text.count("| done (") == 3
    assert "exact meta step alone" in text and "exact, shared forward, k = 4" in text
    for name in ("step_cost", "peak_memory", "epoch_time"):
        assert (tmp_path / name / f"{name}.json").exists() and (tmp_path / name / f"{name}.png").exists()
    epochs = json.loads((tmp_path / "epoch_time" / "epoch_time.json").read_text())
    assert epochs["rounds"]["failed"] == {}
    assert epochs["work"][UNIT]["flops"] < epochs["work"]["MetaMask, k = 1"]["flops"]
