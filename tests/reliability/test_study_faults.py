"""A study under faults: damaged records, missing runs, two studies at once, errors that all trials share."""

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from composing import composed
from refusals import refused

from metamask_plugin.cli import study as cli
from metamask_plugin.cli.study import run_trial, sweep
from metamask_plugin.studies.spec import study_of
from metamask_plugin.studies.tables import write_rows
from metamask_plugin.studies.trial import TrialRun
from metamask_plugin.training import run_folder
from metamask_plugin.training.run_folder import locked

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *(
        "++backbone.kwargs.width=4",
        "++data.fraction=0.05",
        "++data.kwargs.copies=1",
        "++data.kwargs.test_copies=1",
    ),
    *("optimizer.batch_size=16", "accelerator=cpu"),
]
ARMS = "factors.alpha=[1,2]"


class Returned:
    return_value = None


class Study:
    """A study of two tiny trials in a folder; its jobs run here. ``launched`` are those of the last call."""

    def __init__(self, folder):
        self.folder, self.launched = folder, []

    def compose(self, *overrides, name="metamask_fig6", small=SMALL):
        words = ",".join(f"'{word}'" for word in small)
        folders = [f"dir={self.folder / 'studies'}", f"runs_dir={self.folder / 'runs'}"]
        common = [*folders, "size=smoke", "seeds=[5]", f"overrides=[{words}]"]
        return composed("study", name, *common, *overrides)

    def sweep(self, *overrides, **config):
        self.launched = []

        def launch(jobs, first):
            self.launched += jobs
            for job in jobs:
                run_trial(self.compose(*overrides, *job, **config))
            return [Returned()] * len(jobs)

        return sweep(self.compose(*overrides, **config), launch)

    @property
    def records(self):
        return sorted(self.folder.glob("studies/metamask_fig6-smoke/trials/*.json"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two finished trials."""
    study = Study(tmp_path_factory.mktemp("finished"))
    study.sweep(ARMS, "baseline=null")
    return study


@pytest.fixture
def study(finished, tmp_path):
    """A copy of them."""
    shutil.copytree(finished.folder, tmp_path / "copy")
    return Study(tmp_path / "copy")


def changed(**changes):
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def with_row(**changes):
    def change(path):
        record = json.loads(path.read_text())
        record["rows"][0] |= changes
        path.write_text(json.dumps(record))

    return change


def as_folder(path):
    path.unlink()
    path.mkdir()


DAMAGES = {
    "0 bytes": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:200]),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "no rows": changed(rows=None),
    "no state": changed(state=None),
    "a state that is no text": changed(state=[1]),
    "text as a value": with_row(value="53.2"),
    "a metric that is no text": with_row(metric={"a": 1}),
    "a list as a level": with_row(alpha=[1]),
    "no seed": with_row(seed=None),
    "text as seconds": changed(seconds={"encoder": "1", "measures": 2}),
    "a picture elsewhere": changed(pictures=["../../secret.png"]),
    "a folder": as_folder,
}


@pytest.mark.fault("studies")
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_record_is_moved_aside_and_its_trial_made_again(study, capsys, damage):
    path = study.records[0]
    DAMAGES[damage](path)
    assert not TrialRun(*_first(study)).finished
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {path} is damaged (") and err.endswith("; the trial is made again\n")
    assert not path.exists() and path.with_name(path.name + ".unusable").exists()


def _first(study):
    found = study_of(study.compose(ARMS, "baseline=null"))
    return found, found.trials[0]


@pytest.mark.fault("studies")
def test_the_next_sweep_makes_the_trial_of_a_damaged_record_again(study):
    study.records[1].write_bytes(b"")
    report = study.sweep(ARMS, "baseline=null")
    assert study.launched == [["trial=1"]] and len(study.records) == 2
    assert "all 2 trials" in report.read_text()


@pytest.mark.fault("studies")
def test_a_picture_that_is_lost_does_not_cost_the_report(study, capsys):
    changed(pictures=["lost.png"])(study.records[0])
    study.sweep(ARMS, "baseline=null")
    assert study.launched == []
    assert "warning: left out of the report: figure " in capsys.readouterr().err


@pytest.mark.fault("studies")
def test_a_damaged_calibration_is_made_again(tmp_path, capsys):
    folder = tmp_path / "studies" / "metamask_table4-smoke"
    folder.mkdir(parents=True)
    for content in ("", "[]", '{"epochs": []}', '{"epochs": [{"factors": {}, "epochs": "2"}]}'):
        (folder / "calibration.json").write_text(content)
        cfg = Study(tmp_path).compose("equal_time.measured=True", name="metamask_table4")
        assert not cli.is_calibrated(study_of(cfg))
        assert "what an epoch costs is measured again" in capsys.readouterr().err


@pytest.mark.fault("studies")
def test_a_finished_run_without_its_checkpoint_is_one_line_or_trained_again(study, capsys):
    study.records[0].unlink()
    for checkpoint in study.folder.glob("runs/*/*/*.ckpt"):
        checkpoint.unlink()
    try:
        study.sweep(ARMS, "baseline=null")
    except SystemExit:
        assert "must be one with a last.ckpt to measure" in capsys.readouterr().err
    assert study.launched == [["trial=0"]]


@pytest.mark.fault("studies")
def test_a_second_study_in_the_same_folder_is_refused_and_a_report_alone_is_not(study, capsys):
    folder = study.folder / "studies" / "metamask_fig6-smoke"
    with locked(folder, "the study's folder"):
        line = refused(lambda: study.sweep(ARMS, "baseline=null"), capsys)
        assert f"the study's folder {folder} must be used by one process at a time" in line
        assert study.sweep(ARMS, "baseline=null", "report_only=True").exists()
    assert study.sweep(ARMS, "baseline=null").exists()


@pytest.mark.fault("studies")
def test_a_run_that_another_process_holds_is_waited_for_and_shared(study, monkeypatch, capsys):
    run = Path(json.loads(study.records[0].read_text())["run"])
    run = study.folder / run.relative_to(run.parents[2])
    study.records[0].unlink()
    written = (run / "last.ckpt").stat().st_mtime_ns
    held = contextlib.ExitStack()
    held.enter_context(locked(run, "the run folder"))

    def owner(file):
        held.close()  # the other process ends once this one waits
        return "process 7 on there"

    monkeypatch.setattr(run_folder, "_owner", owner)
    study.sweep(ARMS, "baseline=null")
    out = capsys.readouterr().out
    assert out.count(f"note: waiting for process 7 on there, which writes the run folder {run}") == 1
    assert f"This run is complete: {run}" in out and (run / "last.ckpt").stat().st_mtime_ns == written


def test_an_override_that_takes_a_key_out_is_no_path(tmp_path):
    cfg = Study(tmp_path).compose(small=["~optimizer.kwargs"])
    cfg.dir = "~/studies"
    assert cli._validated(cfg).folder == Path.home() / "studies" / "metamask_fig6-smoke"
    assert list(cfg.overrides) == ["~optimizer.kwargs"]


def test_the_words_of_a_report_alone(tmp_path, capsys):
    study = Study(tmp_path)
    study.sweep(ARMS, "baseline=null", "report_only=True")
    assert "0 of 2 trials are finished\n" in capsys.readouterr().out
    assert study.launched == []


@pytest.mark.fault("studies")
def test_finished_trials_that_the_report_leaves_out_are_said(study, capsys):
    study.sweep(ARMS, "baseline=null", "seeds=[6]", "report_only=True")
    out = capsys.readouterr().out
    assert "note: the report leaves out 2 finished trials in " in out
    assert "seeds=[5,6] reports on all seeds" in out
    study.sweep(ARMS, "baseline=null", "seeds=[5]", "report_only=True")
    assert "note:" not in capsys.readouterr().out


@pytest.mark.fault("studies")
@pytest.mark.parametrize(
    ("overrides", "config", "expected"),
    [
        (
            ["+measures.accuracy.ks=[0]"],
            {},
            "measures.accuracy.ks.0 must be an integer >= 1, got 0",
        ),
        (
            ["measures.accuracy.protocol=papers"],
            {},
            "measures.accuracy.protocol must be one of",
        ),
        (
            ["+measures.confounder_audit.banzhaf_masks=20"],
            {"name": "confounder_audit"},
            "banzhaf_masks must be more than ",
        ),
        (
            ["measures.confounder_audit.classifier=knn0"],
            {"name": "confounder_audit"},
            "measures.confounder_audit.classifier must be knn<k> or linear, got 'knn0'",
        ),
        ([], {"small": [*SMALL, "optimizer.name=adamm"]}, "did you mean 'adam"),
        ([], {"small": [*SMALL, "dali.device=cpu"]}, "add it with -- ++dali.device=cpu"),
        ([], {"small": [*SMALL, "optimiser.lr=1"]}, "did you mean 'optimizer.lr'"),
        (
            [],
            {"small": ["data.dataset=custom", "~data.kwargs", "++data.train_path=/no", "++data.val_path=/d"]},
            "/no",
        ),
    ],
)
def test_what_every_trial_would_fail_by_is_said_once_before_the_first(
    tmp_path, capsys, overrides, config, expected
):
    study = Study(tmp_path)
    assert expected in refused(lambda: study.sweep(*overrides, **config), capsys)
    assert study.launched == [] and not (tmp_path / "runs").exists()
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.fault("studies")
def test_levels_that_train_the_same_are_refused(tmp_path, capsys):
    study = Study(tmp_path)
    levels = "factors.arm=[{label: a, overrides: ['max_epochs=2']}, {label: b, overrides: ['max_epochs=02']}]"
    line = refused(lambda: study.sweep(ARMS, levels, "baseline=null"), capsys)
    assert "factors.arm must be levels that train different encoders, got 'a' and 'b'" in line
    assert study.launched == []


@pytest.mark.fault("studies")
def test_a_study_whose_first_trials_fail_alike_stops(tmp_path, capsys, monkeypatch):
    reason = "a disk must be there, got none"

    def pretrain(cfg, wait):
        raise cli.UserError(reason)

    monkeypatch.setattr(cli, "pretrain", pretrain)
    study = Study(tmp_path)
    line = refused(lambda: study.sweep("factors.alpha=[1,2]", "baseline=null", "seeds=[1,2,3]"), capsys)
    assert line == f"error: the study stops, as its first 3 trials failed alike: {reason}"
    assert len(study.launched) == 3
    assert list(tmp_path.rglob("report.html"))


@pytest.mark.fault("studies")
def test_a_trial_that_runs_out_of_memory_fails_and_the_others_go_on(tmp_path, capsys, monkeypatch):
    def pretrain(cfg, wait):
        raise MemoryError("Unable to allocate 61 GB")

    monkeypatch.setattr(cli, "pretrain", pretrain)
    study = Study(tmp_path)
    line = refused(lambda: study.sweep(ARMS, "baseline=null"), capsys)
    assert "error: 2 of 2 trials failed, the first (MetaMask, 1, seed 5) as: the memory is used up" in line
    assert len(study.launched) == 2 and len(study.records) == 2


@pytest.mark.fault("studies")
def test_a_launchers_process_that_is_killed_leaves_a_report_and_one_line(tmp_path, capsys):
    from concurrent.futures.process import BrokenProcessPool

    def launch(jobs, first):
        raise BrokenProcessPool("a worker was killed")

    cfg = Study(tmp_path).compose(ARMS, "baseline=null")
    line = refused(lambda: sweep(cfg, launch), capsys)
    assert "a process of hydra/launcher must live" in line and "n_jobs" in line
    assert list(tmp_path.rglob("report.html"))


@pytest.mark.fault("studies")
def test_a_bug_in_a_trial_shows_its_traceback_after_the_report(tmp_path, capsys):
    def launch(jobs, first):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        sweep(Study(tmp_path).compose(ARMS, "baseline=null"), launch)
    assert "stopped; the same command goes on. So far: " in capsys.readouterr().out
    assert list(tmp_path.rglob("report.html"))


@pytest.mark.fault("security")
def test_results_hold_no_formula_of_a_spreadsheet(tmp_path):
    labels = ["=1+1", "@SUM(A1)", "+1", "-cmd", "\tx", "plain", "a=b"]
    write_rows([{"arm": label, "seed": 5, "metric": "knn5", "value": -1.5} for label in labels], tmp_path)
    with (tmp_path / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == [*(f"'{label}" for label in labels[:5]), *labels[5:]]
    assert {row["value"] for row in rows} == {"-1.5"}
    assert json.loads((tmp_path / "results.json").read_text())["rows"][0]["arm"] == "=1+1"


@pytest.mark.fault("studies")
def test_another_checkpoint_under_an_old_date_is_audited_anew(finished, tmp_path):
    run, other = finished.folder.glob("runs/metamask/*/last.ckpt")
    shutil.copytree(run.parent, tmp_path / "run")
    cfg = Study(tmp_path).compose(f"checkpoint={tmp_path / 'run'}", name="confounder_audit")
    paths = []
    for source in (run, other, run):
        shutil.copyfile(source, tmp_path / "run" / "last.ckpt")
        os.utime(tmp_path / "run" / "last.ckpt", (1, 1))
        found = study_of(cfg)
        paths.append(TrialRun(found, found.trials[0]).record_path)
    assert paths[0] == paths[2] != paths[1]


@pytest.mark.fault("processes")
@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_study_with_its_number_and_a_report(tmp_path, number, code):
    words = ["--config-name", "metamask_fig6", "size=smoke", "seeds=[5]", "--", *SMALL, "max_epochs=500"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "main_study.py"), *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    said = ""
    while "epoch 2/" not in said:
        said += process.stdout.readline()
    process.send_signal(number)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == code, said + rest
    assert "interrupted; the same command goes on. So far: " in rest and "Traceback" not in rest
    assert list(tmp_path.rglob("report.html"))
