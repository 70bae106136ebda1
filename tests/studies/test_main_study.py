"""Studies from config to report: each of them at its smallest, and what happens between two calls."""

import csv
import json
import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from PIL import Image
from refusals import refused
from report_page import check_page

from metamask_plugin.cli.known import shipped
from metamask_plugin.cli.study import _validated, catalogue, sweep
from metamask_plugin.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

QUICK = (
    "confounder_audit",
    "icl_msr_table4",
    "metamask_fig9",
)
"""Between them they use every measure; the others take longer than the test command should."""


def rows_of(report):
    with (report.parent / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in shipped("study")],
)
def test_every_study_runs_to_its_report(studies, name):
    report = studies.sweep(name)
    trials = [json.loads(path.read_text()) for path in (report.parent / "trials").glob("*.json")]
    launched = [job for job in studies.launched if "calibrating=True" not in job]
    assert len(trials) == len(launched) > 0
    assert {trial["state"] for trial in trials} == {"finished"}
    rows = rows_of(report)
    assert {"seed", "checkpoint", "metric", "value"} < set(rows[0])
    assert all(trial["environment"]["torch"] and trial["rows"] for trial in trials)
    check_page(report)
    check_page(report.parents[1] / "index.html", relative_links=True)
    assert list(report.parent.glob("figure*.png")) or list((report.parent / "trials").glob("*.png"))


def test_finished_trials_are_not_run_again_and_a_change_is_a_new_trial(fresh_studies):
    alphas = "factors.alpha=[10]"
    report = fresh_studies.sweep("metamask_fig6", alphas)
    assert len(fresh_studies.launched) == 1
    before = report.parent.joinpath("results.csv").read_text()
    assert fresh_studies.sweep("metamask_fig6", alphas) == report
    assert fresh_studies.launched == [] and report.parent.joinpath("results.csv").read_text() == before
    fresh_studies.sweep("metamask_fig6", alphas, "overrides=['optimizer.lr=1e-3']")
    assert len(fresh_studies.launched) == 1
    runs = list((fresh_studies.folder / "runs").rglob("last.ckpt"))
    assert len(runs) == 2


def test_a_run_that_is_there_is_measured_and_not_trained_again(fresh_studies, capsys):
    fresh_studies.sweep("metamask_fig6", "factors.alpha=[10]")
    (checkpoint,) = (fresh_studies.folder / "runs").rglob("last.ckpt")
    written = checkpoint.stat().st_mtime_ns
    fresh_studies.sweep("metamask_fig6", "factors.alpha=[10]", "+measures.accuracy.ks=[3]")
    assert len(fresh_studies.launched) == 1 and checkpoint.stat().st_mtime_ns == written
    assert "This run is complete" in capsys.readouterr().out
    assert "knn3" in {
        row["metric"]
        for row in rows_of(
            fresh_studies.sweep("metamask_fig6", "factors.alpha=[10]", "+measures.accuracy.ks=[3]")
        )
    }


def test_data_that_are_missing_are_said_once_before_the_first_trial(fresh_studies, tmp_path, capsys):
    for split, label in product(("train", "val"), "abcdefghij"):
        (tmp_path / "cifar10" / split / label).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(tmp_path / "cifar10" / split / label / "0.png")
    cfg = fresh_studies.compose(
        "icl_msr_table1", "size=paper", f"roots.cifar10={tmp_path}/cifar10", "factors.arm=[SimCLR]"
    )
    with pytest.raises(SystemExit):
        sweep(cfg, lambda jobs, first: pytest.fail("a trial began"))
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert "missing: cifar100 in ./datasets, stl10 in ./datasets, " in error
    assert "give roots.cifar100=<folder> roots.stl10=<folder>" in error
    assert error.endswith("or take datasets=[cifar10]")


def test_what_a_replaced_block_referred_to_stays_a_key_of_the_study(fresh_studies):
    words = ("comparison_cpu", "size=paper", "factors.arm=[SimCLR]", "baseline=null")
    study = _validated(fresh_studies.compose(*words))
    assert {trial.factors["arm"] for trial in study.trials} == {"SimCLR"}
    with pytest.raises(UserError, match=r"got 'taw'"):
        _validated(fresh_studies.compose(*words, "+taw=0.2"))


def test_a_trial_that_fails_does_not_stop_the_others_and_is_run_again(fresh_studies, capsys):
    levels = "factors.alpha=[{value:1},{value:2,overrides:['backbone.name=conf']}]"
    for _ in range(2):
        message = refused(lambda: fresh_studies.sweep("metamask_fig6", levels, "baseline=null"), capsys)
        assert message.startswith(
            "error: 1 of 2 trials failed, the first (MetaMask, 2, seed 5) as: backbone.name must be"
        )
    assert len(fresh_studies.launched) == 1
    report = fresh_studies.folder / "studies" / "metamask_fig6-smoke" / "report.html"
    assert {row["alpha"] for row in rows_of(report)} == {"1"}
    assert "backbone.name must be" in report.read_text()


@pytest.mark.fault("studies")
@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (KeyboardInterrupt, 130),
        # within a training, which has saved
        pytest.param(lambda: SystemExit(128 + signal.SIGTERM), 143, marks=pytest.mark.slow),
        (lambda: os.kill(os.getpid(), signal.SIGTERM) or RuntimeError("not reached"), 143),
    ],
)
def test_an_interruption_leaves_a_report_and_the_same_command_goes_on(
    fresh_studies, monkeypatch, capsys, stop, code
):
    done = []
    job = fresh_studies.job

    def interrupted(*args):
        if done:
            raise stop()
        done.append(job(*args))
        return done[-1]

    monkeypatch.setattr(fresh_studies, "job", interrupted)
    with pytest.raises(SystemExit) as stopped:
        fresh_studies.sweep("metamask_fig6", "factors.alpha=[1,2]", "baseline=null")
    assert stopped.value.code == code
    assert "interrupted; the same command goes on" in capsys.readouterr().out
    monkeypatch.setattr(fresh_studies, "job", job)
    report = fresh_studies.sweep("metamask_fig6", "factors.alpha=[1,2]", "baseline=null")
    assert len(fresh_studies.launched) == 1
    assert {row["alpha"] for row in rows_of(report)} == {"1", "2"}


def test_no_trial_begins_after_the_time_is_over(fresh_studies, capsys):
    fresh_studies.sweep("metamask_fig6", "factors.alpha=[1,2]", "baseline=null", "minutes=0.0001")
    assert len(fresh_studies.launched) == 1
    assert "1 trials are left, the same command goes on" in capsys.readouterr().out


@pytest.mark.slow
def test_equal_time_gives_each_arm_the_epochs_that_the_reference_takes(fresh_studies):
    report = fresh_studies.sweep(
        "metamask_table4",
        "equal_time.measured=True",
        "equal_time.epochs=2",
        "equal_time.clock=cpu_seconds_per_epoch",
    )
    calibrating = [job for job in fresh_studies.launched if "calibrating=True" in job]
    assert len(calibrating) == 2 and len(fresh_studies.launched) == 4
    found = json.loads((report.parent / "calibration.json").read_text())["epochs"]
    costs = {entry["factors"]["arm"]: entry["cpu_seconds_per_epoch"] for entry in found}
    factors = {entry["factors"]["arm"]: entry["epochs"] for entry in found}
    assert factors["MetaMask"] == 1
    assert factors["SimCLR"] == pytest.approx(costs["MetaMask"] / costs["SimCLR"])
    epochs = {
        row["arm"]: float(row["value"])
        for row in rows_of(report)
        if row["metric"] == "epochs" and row["checkpoint"] == "last"
    }
    assert epochs["MetaMask"] == 1 and epochs["SimCLR"] == max(1, round(factors["SimCLR"]))


def test_a_checkpoint_of_any_kind_is_masked_and_audited(fresh_studies, studies):
    studies.sweep("metamask_fig9")
    run = next(path.parent for path in (studies.folder / "runs" / "metamask").rglob("last.ckpt"))
    report = fresh_studies.sweep("metamask_fig2", f"checkpoint=[{run},{run / 'best' / 'best.ckpt'}]")
    unmasked = [row for row in rows_of(report) if row["metric"] == "masked" and row["rate"] == "0.0"]
    assert len({row["encoder"] for row in unmasked}) == 2
    assert len({row["value"] for row in unmasked if row["classifier"] == "linear"}) == 1, "one encoder twice"
    assert not (fresh_studies.folder / "runs").exists(), "nothing was trained"


@pytest.mark.slow
def test_parallel_trials_in_processes_of_their_own(tmp_path):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    words = [
        "metamask_fig6",
        "size=smoke",
        "seeds=[5]",
        "quiet=True",
        "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2",
    ]
    command = [sys.executable, str(ROOT / "main_study.py"), "--config-name", *words, "--", "max_epochs=1"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = tmp_path / "studies" / "metamask_fig6-smoke" / "report.html"
    assert {row["alpha"] for row in rows_of(report)} == {"10", "100"}
    assert len(list((report.parent / "trials").glob("*.log"))) == 2
    assert (tmp_path / "studies" / "index.html").exists()


def test_the_list_has_every_study_with_its_settings():
    text = catalogue()
    for name in shipped("study"):
        assert f"\n{name}: " in text
    assert "trials    33, seeds 5, 6, 7" in text or "trials " in text
    assert "setting=metamask_table1" in text


UNDER_JOBLIB = """
import joblib, torch
from metamask_plugin.cli.study import _let_loaders_start_workers

def loaded():
    _let_loaders_start_workers()
    return [batch.tolist() for batch in torch.utils.data.DataLoader(torch.arange(4), 2, num_workers=1)]

if __name__ == "__main__":
    print(joblib.Parallel(n_jobs=2)([joblib.delayed(loaded)()]))
"""


@pytest.mark.slow
def test_under_joblib_loaders_may_have_workers():
    pytest.importorskip("joblib", reason="Hydra's joblib launcher is not installed")
    # a process of its own: joblib's workers outlive the call
    done = subprocess.run([sys.executable, "-c", UNDER_JOBLIB], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[[[0, 1], [2, 3]]]", done.stderr
