"""``main_study.py``: the trials of a study, and the report over what is finished."""

import contextlib
import multiprocessing
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.checked import plain
from metamask_plugin.cli.config import complete, for_method
from metamask_plugin.cli.dry_run_study import dry_run_trials
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.hydra_errors import told
from metamask_plugin.cli.known import shipped
from metamask_plugin.cli.paths import expand_paths, expanded
from metamask_plugin.cli.pretrain import pretrain
from metamask_plugin.config import studies as config
from metamask_plugin.config.read import read
from metamask_plugin.config.signatures import check_keywords
from metamask_plugin.data import load_dataset
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.files import remove_unfinished
from metamask_plugin.methods import METHODS
from metamask_plugin.signals import Preempted, exit_code
from metamask_plugin.studies.equal_time import (
    calibrated,
    calibration,
    is_calibrated,
    is_measured,
    write_calibration,
)
from metamask_plugin.studies.levels import own_files
from metamask_plugin.studies.measures import MEASURES
from metamask_plugin.studies.pretraining import check_different
from metamask_plugin.studies.results import write_results
from metamask_plugin.studies.spec import Study, study_of
from metamask_plugin.studies.trial import Pretraining, TrialRun, log_file
from metamask_plugin.training.run_folder import locked

ALIKE = 3
"""Trials that fail alike from the beginning before the study stops."""

Launch = Callable[[list[list[str]], int], Sequence[Any]]
"""Runs a job for each list of overrides of the study's config, numbered from the second argument on."""


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
        record = run.run(Pretraining(lambda pretraining: pretrain(complete(pretraining), wait=True), _build))
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

    The report is also written when something ends the study early; the same command goes on.

    Args:
        cfg: the composed study config.
        launch: hands trials to Hydra's launcher.

    Returns:
        The report's path.
    """
    with one_line_errors():
        study = _validated(cfg)
        runs = _runs(calibrated(study))
        check_different((run.trial, run.cfg) for run in runs)
        if cfg.report_only:
            print(f"{study.title} ({study.size}), {study.source}\n{_progress(runs)}")
            return _reported(calibrated(study), runs)
        dry_run_trials(runs, configs="submitit" not in _launcher(cfg))
        with locked(study.folder, "the study's folder"):
            for folder in (study.folder, study.folder / "trials"):
                remove_unfinished(folder)
            return _swept(study, cfg, launch)


def _swept(study: Study, cfg: DictConfig, launch: Launch) -> Path:
    first = 0
    if is_measured(study) and not is_calibrated(study):
        print(f"{study.title}: what an epoch of each costs")
        runs = _runs(calibration(study))
        with _said_when_ended():
            _run_missing(runs, launch, 0, cfg, ["calibrating=True"])
        write_calibration(study, [run.record for run in runs])
        first = len(runs)
    study = calibrated(study)
    print(f"{study.title} ({study.size}), {study.source}")
    runs = _runs(study)
    with _said_when_ended(lambda: write_results(study, runs)):
        _run_missing(runs, launch, first, cfg)
    return _reported(study, runs)


@contextlib.contextmanager
def _said_when_ended(report: Callable[[], Path] | None = None) -> Iterator[None]:
    """Around the trials: whatever ends them early, there is a report over what is finished."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt | SystemExit | Preempted)
        what = "interrupted" if interrupted else "stopped"
        so_far = ""
        with contextlib.suppress(Exception):  # what ended the study must be said, whatever the report says
            so_far = "" if report is None else f". So far: {report()}"
        print(f"{what}; the same command goes on{so_far}", flush=True)
        if interrupted:
            raise SystemExit(exit_code(error)) from None
        if isinstance(error, BrokenExecutor):
            raise UserError(
                f"a process of hydra/launcher must live as long as its trial, got: {error}; free memory or "
                "lower hydra.launcher.n_jobs"
            ) from None
        raise


def _reported(study: Study, runs: Sequence[TrialRun]) -> Path:
    """Writes the report and prints its tables.

    Raises:
        UserError: a trial has failed.
    """
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

    A key of the study's own, which others refer to (``${small_arms}``), is no mistake; what refers to it may
    have been replaced on the command line.
    """
    _expand_own_paths(cfg)
    own = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
    text = "".join(
        [OmegaConf.to_yaml(own, resolve=False), *(path.read_text() for path in own_files(cfg.name))]
    )
    known = config.Study.model_fields
    node = {key: value for key, value in plain(own).items() if key in known or f"${{{key}}}" not in text}
    read(config.Study, node)
    study = study_of(cfg)
    lists = study.measures.get("few_labels", {}).get("subset_files") or []
    for path in [lists] if isinstance(lists, str) else lists:
        check(Path(path).is_file(), "measures.few_labels.subset_files", "files that are there", path)
    for name, options in study.measures.items():
        measure = MEASURES[choose("measures", name, MEASURES)]
        check_keywords(f"measures.{name}", options, measure, config.MEASURES[name], aside=("subject",))
    return study


def _expand_own_paths(cfg: DictConfig) -> None:
    """Expands ``~`` in the study's paths; in overrides, ``~key`` takes a key out of the config."""
    for key in ("dir", "runs_dir", "checkpoint", "roots", "data", "measures"):
        value = cfg.get(key)
        if OmegaConf.is_config(value):
            expand_paths(value, key)
        elif value is not None:
            cfg[key] = expanded(value, key)


def _runs(study: Study) -> list[TrialRun]:
    """All trials, with their pretraining configs composed.

    Raises:
        UserError: for an override that their config does not take, as ``main_pretrain.py`` says it.
    """
    runs = []
    for trial in study.trials:
        try:
            runs.append(TrialRun(study, trial))
        except UserError as error:
            if not isinstance(error.__cause__, HydraException | OmegaConfBaseException):
                raise
            line = str(told(error.__cause__, "pretrain"))
            for word in trial.overrides:  # the remedy, ready to be pasted
                line = line.replace(f"++{word.partition('=')[0]}=...", f"-- ++{word}")
            raise UserError(f"{trial.title}: {line}") from error
    return runs


def _progress(runs: Sequence[TrialRun]) -> str:
    return f"{sum(run.finished for run in runs)} of {len(runs)} trials are finished"


def _run_missing(
    runs: Sequence[TrialRun], launch: Launch, first: int, cfg: DictConfig, overrides: Sequence[str] = ()
) -> None:
    """Launches what is not finished.

    Raises:
        UserError: the first trials all failed by the same error.
    """
    missing = [run for run in runs if not run.finished]
    print(f"{_progress(runs)}, {len(missing)} to make", flush=True)
    # a launcher takes all that it is given: one after the other, the study can stop in between
    together = 1 if cfg.minutes is not None or "BasicLauncher" in _launcher(cfg) else max(1, len(missing))
    started = time.monotonic()
    errors = []
    for start in range(0, len(missing), together):
        if cfg.minutes is not None and time.monotonic() - started > 60 * cfg.minutes:
            left = len(missing) - start
            print(f"{cfg.minutes} minutes are over; {left} trials are left, the same command goes on")
            break
        some = missing[start : start + together]
        jobs = [[*overrides, f"trial={run.trial.index}"] for run in some]
        for job in launch(jobs, first + start):
            _ = job.return_value  # raises what the job raised
        errors += [(run.record or {}).get("error") for run in some]
        if len(errors) == ALIKE < len(missing) and None not in errors and len(set(errors)) == 1:
            raise UserError(f"the study stops, as its first {ALIKE} trials failed alike: {errors[0]}")


def _launcher(cfg: DictConfig) -> str:
    """The launcher's class; Hydra's own runs one job after the other, in this process."""
    return OmegaConf.select(cfg, "hydra.launcher._target_", default=None) or "BasicLauncher"


def _build(cfg: DictConfig) -> nn.Module:
    """The untrained method of a pretraining config."""
    cfg = complete(cfg)
    own = for_method(cfg, load_dataset(cfg.data).num_classes)
    with torch.random.fork_rng():
        return METHODS[cfg.method](own)


def catalogue() -> str:
    """All studies with their settings, as text."""
    width = max(80, shutil.get_terminal_size().columns)
    lines = ["studies  (python main_study.py --config-name <name> [size=paper|digits|smoke] [key=value ...])"]
    with initialize_config_dir(str((SCRIPTS / "study").resolve()), version_base="1.2"):
        for name in shipped("study"):
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
