"""``main_study.py``: the trials of a study, and the report over what is finished."""

import contextlib
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.config import complete
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.free_form import check_keywords
from metamask_plugin.cli.pretrain import pretrain
from metamask_plugin.cli.schema_study import STUDY
from metamask_plugin.cli.validate import plain, validate
from metamask_plugin.data import load_dataset
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.methods import METHODS
from metamask_plugin.signals import Preempted, exit_code, say
from metamask_plugin.studies.equal_time import calibrated, calibration, is_measured, write_calibration
from metamask_plugin.studies.measures import MEASURES
from metamask_plugin.studies.results import write_results
from metamask_plugin.studies.roots import remedy
from metamask_plugin.studies.spec import Study, study_of
from metamask_plugin.studies.trial import Pretraining, TrialRun, log_file

Launch = Callable[[list[list[str]], int], Sequence[Any]]
"""Runs a job for each list of overrides of the study's config, numbered from the second argument on."""


def with_pretraining_overrides(argv: Sequence[str]) -> list[str]:
    """Turns what stands behind ``--`` into the study config's ``overrides``, quoted as Hydra wants it."""
    if "--" not in argv:
        return list(argv)
    place = list(argv).index("--")
    quoted = ",".join(
        "'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in argv[place + 1 :]
    )
    return [*argv[:place], f"overrides=[{quoted}]"]


def run_trial(cfg: DictConfig) -> None:
    """One job: the trial ``cfg.trial``. A failure by bad input is in its record, not raised.

    Args:
        cfg: the composed study config.
    """
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    _let_loaders_start_workers()
    study = _study(cfg)
    check(
        isinstance(cfg.trial, int) and 0 <= cfg.trial < len(study.trials),
        "trial",
        "one of the study's",
        cfg.trial,
    )
    run = TrialRun(study, study.trials[cfg.trial])
    print(f"\n[{cfg.trial + 1} of {len(study.trials)}] {run.trial.title}", flush=True)
    silence = log_file(run.record_path.with_suffix(".log")) if cfg.quiet else contextlib.nullcontext()
    with silence:
        record = run.run(Pretraining(lambda pretraining: pretrain(complete(pretraining)), _build))
    if record["state"] == "failed":
        print(f"failed: {run.trial.title}: {record['error']}", flush=True)
    else:
        print(f"finished in {sum(record['seconds'].values()):.0f} s: {run.trial.title}", flush=True)


def _let_loaders_start_workers() -> None:
    """Under Hydra's joblib launcher, sets the platform's way to start processes.

    joblib's own, which its workers have as their default, fails where torch starts a loader's workers.
    """
    if multiprocessing.get_start_method() == "loky":
        multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)


def sweep(cfg: DictConfig, launch: Launch) -> Path | None:
    """Launches the trials that are not finished, then writes results and report.

    The report is also written when it is interrupted; the same command goes on with what is left.

    Args:
        cfg: the composed study config.
        launch: hands trials to Hydra's launcher.

    Returns:
        The report's path.
    """
    with one_line_errors():
        check(len(cfg) > 1, "--config-name", f"one of {', '.join(shipped_studies())}", None)
        study = _validated(cfg)
        first = 0
        if is_measured(study) and not (study.folder / "calibration.json").exists() and not cfg.report_only:
            print(f"{study.title}: what an epoch of each costs")
            runs = _runs(calibration(study))
            _run_missing(runs, launch, 0, cfg, ["calibrating=True"])
            write_calibration(study, [run.record for run in runs])
            first = len(runs)
        study = calibrated(study)
        print(f"{study.title} ({study.size}), {study.source}")
        runs = _runs(study)
        try:
            _run_missing(runs, launch, first, cfg)
        except (KeyboardInterrupt, SystemExit, Preempted) as stop:
            report = write_results(study, runs)
            say(f"interrupted; the same command goes on. So far: {report}")
            raise SystemExit(exit_code(stop)) from None
        report = write_results(study, runs)
        shown = (study.folder / "tables.md").read_text()
        print(f"\n{shown}\nreport: {report}" if shown else f"\nreport: {report}")
        records = [run.record for run in runs]
        failed = [record for record in records if record is not None and record["state"] == "failed"]
        if failed:
            raise UserError(
                f"{len(failed)} of {len(study.trials)} trials failed, the first ({failed[0]['title']}) as: "
                f"{failed[0]['error']}"
            )
        return report


def _study(cfg: DictConfig) -> Study:
    study = _validated(cfg)
    return calibration(study) if cfg.calibrating else calibrated(study)


def _validated(cfg: DictConfig) -> Study:
    """The study of a config, whose every key is known and whose values fit.

    A key of the study's own, which others refer to (``${small_arms}``), is no mistake.
    """
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    text = OmegaConf.to_yaml(own, resolve=False)
    node = {key: value for key, value in plain(own).items() if key in STUDY or f"${{{key}}}" not in text}
    validate(node, STUDY)
    study = study_of(cfg)
    lists = study.measures.get("few_labels", {}).get("subset_files") or []
    for path in [lists] if isinstance(lists, str) else lists:
        check(Path(path).is_file(), "measures.few_labels.subset_files", "files that are there", path)
    for name, options in study.measures.items():
        check_keywords(f"measures.{name}", options, MEASURES[choose("measures", name, MEASURES)])
    return study


def _runs(study: Study) -> list[TrialRun]:
    """All trials, with their pretraining configs composed."""
    return [TrialRun(study, trial) for trial in study.trials]


def _run_missing(
    runs: Sequence[TrialRun], launch: Launch, first: int, cfg: DictConfig, overrides: Sequence[str] = ()
) -> None:
    """Launches what is not finished."""
    missing = [] if cfg.report_only else [run.trial.index for run in runs if not run.finished]
    print(
        f"{len(runs) - len(missing)} of {len(runs)} trials are finished, {len(missing)} to make", flush=True
    )
    _require_data([run for run in runs if run.trial.index in missing])
    jobs = [[*overrides, f"trial={index}"] for index in missing]
    # with a time limit one after the other, as a launcher takes all it is given
    together = 1 if cfg.minutes is not None else max(1, len(jobs))
    started = time.monotonic()
    for start in range(0, len(jobs), together):
        if cfg.minutes is not None and time.monotonic() - started > 60 * cfg.minutes:
            left = len(jobs) - start
            print(f"{cfg.minutes} minutes are over; {left} trials are left, the same command goes on")
            break
        for job in launch(jobs[start : start + together], first + start):
            _ = job.return_value  # raises what the job raised


def _require_data(runs: Sequence[TrialRun]) -> None:
    """Looks at each data set once, before the first trial.

    Raises:
        UserError: with all that are missing.
    """
    first: dict[str, TrialRun] = {}
    for run in runs:
        if run.trial.dataset is not None:
            first.setdefault(run.trial.dataset, run)
    faults = {}
    for name, run in first.items():
        try:
            load_dataset(run.cfg.data)
        except UserError as error:
            faults[name] = (run.cfg.data.train_path, error)
    if faults:
        where = ", ".join(f"{name} in {path}" for name, (path, _) in faults.items())
        reason = next(iter(faults.values()))[1]
        there = [name for name in first if name not in faults]
        raise UserError(f"data must be there, missing: {where} ({reason}); {remedy(list(faults), there)}")


def _build(cfg: DictConfig) -> nn.Module:
    """The untrained method of a pretraining config."""
    cfg = complete(cfg)
    cfg.data.num_classes = load_dataset(cfg.data).num_classes
    with torch.random.fork_rng():
        return METHODS[cfg.method](cfg)


def shipped_studies() -> list[str]:
    """Names of the study configs."""
    return sorted(path.stem for path in (SCRIPTS / "study").glob("*.yaml") if path.stem != "base")


def catalogue() -> str:
    """All studies with their settings, as text."""
    width = max(80, shutil.get_terminal_size().columns)
    lines = ["studies  (python main_study.py --config-name <name> [size=paper|digits|smoke] [key=value ...])"]
    with initialize_config_dir(str((SCRIPTS / "study").resolve()), version_base="1.2"):
        for name in shipped_studies():
            cfg = compose(name)
            study = study_of(cfg)
            lines += ["", f"{name}: {study.title}"]
            if study.claim:
                lines.append(f"  claim     {study.claim}")
            for factor in study.factors:
                values = list(dict.fromkeys(str(trial.factors[factor]) for trial in study.trials))
                lines.append(f"  {factor:<9} {', '.join(values)}")
            configs = ", ".join(dict.fromkeys(trial.config for trial in study.trials))
            lines.append(f"  config    {' '.join([configs, *OmegaConf.to_container(cfg.settings)])}")
            measures = [f"{key} {options}" if options else key for key, options in study.measures.items()]
            lines.append(f"  measures  {', '.join(measures)}")
            lines.append(f"  trials    {len(study.trials)}, seeds {', '.join(map(str, study.seeds))}")
    return "\n".join(line if len(line) <= 2 * width else line[: 2 * width - 1] + "…" for line in lines)
