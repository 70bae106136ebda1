"""The same time for every level of a factor: how many epochs that is, is measured (MetaMask, Table 4)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.files import read_json
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.studies.spec import Study, Trial

CLOCKS = ("seconds_per_epoch", "cpu_seconds_per_epoch")


def is_measured(study: Study) -> bool:
    """Whether the study's epochs are those of a calibration."""
    return bool((study.config.get("equal_time") or {}).get("measured"))


def calibration(study: Study) -> Study:
    """The study that measures what an epoch of each level costs: few epochs, one seed, nothing else.

    Raises:
        UserError: for a calibration that names no such factor, level or clock.
    """
    asked = study.config["equal_time"]
    factor = choose("equal_time.factor", asked.get("factor"), study.factors)
    choose("equal_time.clock", asked.get("clock"), CLOCKS)
    epochs = asked.get("epochs")
    check(isinstance(epochs, int) and epochs >= 1, "equal_time.epochs", "an integer >= 1", epochs)
    levels = list(dict.fromkeys(trial.factors[factor] for trial in study.trials))
    choose("equal_time.reference", asked.get("reference"), [str(level) for level in levels])
    first = [trial for trial in study.trials if trial.seed == study.seeds[0]]
    trials = [
        replace(trial, index=index, overrides=(*trial.overrides, f"max_epochs={epochs}"), epochs=1.0)
        for index, trial in enumerate(first)
    ]
    return replace(study, folder=study.folder / "calibration", trials=tuple(trials), measures={"cost": {}})


def is_calibrated(study: Study) -> bool:
    """Whether there is a calibration, and it is not damaged."""
    return _read(study) is not None


def calibrated(study: Study) -> Study:
    """The study with the epochs that its calibration found; as it is where there is none yet."""
    found = _read(study) if is_measured(study) else None
    if found is None:
        return study
    factors = {_key(entry["factors"]): entry["epochs"] for entry in found["epochs"]}
    return replace(study, trials=tuple(_with_epochs(trial, factors) for trial in study.trials))


def write_calibration(study: Study, records: Sequence[Mapping[str, Any]]) -> Path:
    """From the calibration's records to the factors on ``max_epochs``, in ``calibration.json``.

    Args:
        study: the study, not its calibration.
        records: of the calibration's trials.

    Raises:
        UserError: when a trial failed.
    """
    asked = study.config["equal_time"]
    costs = {}
    for record in records:
        if record["state"] != "finished":
            raise UserError(f"the calibration of {record['title']} must finish, got: {record['error']}")
        costs[_key(record["factors"])] = next(
            row["value"] for row in record["rows"] if row["metric"] == asked["clock"]
        )
    entries = []
    for record in records:
        reference = _key({**record["factors"], asked["factor"]: asked["reference"]})
        ratio = costs[reference] / costs[_key(record["factors"])]
        entries.append(
            {"factors": record["factors"], asked["clock"]: costs[_key(record["factors"])], "epochs": ratio}
        )
    write_summary(_path(study), {"clock": asked["clock"], "reference": asked["reference"], "epochs": entries})
    return _path(study)


def _path(study: Study) -> Path:
    return study.folder / "calibration.json"


def _read(study: Study) -> dict[str, Any] | None:
    return read_json(_path(study), _fault_of, "what an epoch costs is measured again")


def _fault_of(found: Any) -> str | None:
    entries = found.get("epochs") if isinstance(found, dict) else None
    if not isinstance(entries, list) or not entries:
        return "it has no epochs"
    for entry in entries:
        epochs = entry.get("epochs") if isinstance(entry, dict) else None
        if not (isinstance(epochs, int | float) and epochs > 0 and isinstance(entry.get("factors"), dict)):
            return "an entry has no factors or no epochs"
    return None


def _key(factors: Mapping[str, Any]) -> str:
    return json.dumps(factors, sort_keys=True, default=str)


def _with_epochs(trial: Trial, factors: Mapping[str, float]) -> Trial:
    found = factors.get(_key(trial.factors))
    check(
        found is not None, "calibration.json", f"one with {trial.title}", None, "remove it to calibrate anew"
    )
    return replace(trial, epochs=found)
