"""One trial: an encoder is trained, or taken from a checkpoint, and measured; a record is written."""

import contextlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import lightning
import torch
from omegaconf import DictConfig
from torch import nn

import metamask_plugin
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.files import read_json
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.studies.measures import MEASURES
from metamask_plugin.studies.pretraining import command, digest, pretraining_config
from metamask_plugin.studies.spec import Study, Trial
from metamask_plugin.studies.subject import Subject, subject_of_checkpoint, subject_of_run
from metamask_plugin.training.run_folder import RunFolder


@dataclass(frozen=True)
class Pretraining:
    """How encoders come about: what the layer above lends to a study.

    Attributes:
        run: from a composed config to the folder of the finished run, which it goes on with where it stopped.
        build: from a composed config to the untrained method.
    """

    run: Callable[[DictConfig], RunFolder]
    build: Callable[[DictConfig], nn.Module]


class TrialRun:
    """A trial, where its record lies, and whether that is there already.

    Args:
        study: the study.
        trial: one of its trials.
    """

    def __init__(self, study: Study, trial: Trial):
        self.study, self.trial = study, trial
        self.cfg = pretraining_config(study, trial) if trial.checkpoint is None else None
        stem = f"{trial.slug[:60].strip('-')}-{digest(study, trial, self.cfg)}"
        self.record_path = study.folder / "trials" / f"{stem}.json"

    @property
    def record(self) -> dict[str, Any] | None:
        """What was written when the trial finished or failed; None before, and where the file is damaged."""
        return read_record(self.record_path)

    @property
    def finished(self) -> bool:
        record = self.record
        return record is not None and record["state"] == "finished"

    def run(self, pretraining: Pretraining) -> dict[str, Any]:
        """Trains and measures; returns the record, which is also in the file.

        A trial that fails by what the user can mend leaves a record that says so, and is run again next time.
        """
        started = time.monotonic()
        record: dict[str, Any] = {
            "title": self.trial.title,
            "factors": dict(self.trial.factors),
            "seed": self.trial.seed,
            "command": None if self.cfg is None else command(self.study, self.trial, self.cfg),
            "checkpoint": self.trial.checkpoint,
            "environment": environment(),
        }
        try:
            subject = self._subject(pretraining)
            about = [self._about(subject)]
            record["run"] = None if subject.folder is None else str(subject.folder)
            trained = time.monotonic()
            record |= self._measure(subject, about)
            record["about"] = ". ".join(about)
            record["state"] = "finished"
            record["seconds"] = {"encoder": trained - started, "measures": time.monotonic() - trained}
        except UserError as error:
            record |= {"state": "failed", "error": str(error), "rows": []}
        except (MemoryError, torch.OutOfMemoryError) as error:
            reason = f"the memory is used up ({error}); lower optimizer.batch_size, or free some"
            record |= {"state": "failed", "error": reason, "rows": []}
        record["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        write_summary(self.record_path, record)
        return record

    def _subject(self, pretraining: Pretraining) -> Subject:
        trial = self.trial
        if self.cfg is None:
            return subject_of_checkpoint(trial.checkpoint, self.study.data, trial.seed, trial.title)
        run = pretraining.run(self.cfg.copy())
        model = pretraining.build(self.cfg.copy()) if "cost" in self.study.measures else None
        return subject_of_run(run, trial.seed, trial.title, model)

    def _about(self, subject: Subject) -> str:
        sizes = subject.data.sizes
        images = f"{sizes['train']} training and {sizes['test']} test images of {subject.data.name}"
        return images if self.cfg is None else f"{images}, {self.cfg.max_epochs} epochs"

    def _measure(self, subject: Subject, about: list[str]) -> dict[str, Any]:
        rows, pictures, details = [], [], {}
        for name, options in self.study.measures.items():
            print(f"measuring {name}", flush=True)
            measured = MEASURES[name](subject, **options)
            known = {**self.trial.factors, "seed": self.trial.seed}
            rows += [{**known, "checkpoint": "last", **row} for row in measured.rows]
            about += [measured.about] if measured.about else []
            details |= {name: measured.details} if measured.details else {}
            for file, figure in measured.pictures.items():
                path = self.record_path.with_name(f"{self.record_path.stem}-{file}")
                path.parent.mkdir(parents=True, exist_ok=True)
                save(figure, path)
                pictures.append(path.name)
        return {"rows": rows, "pictures": pictures, "details": details}


def read_record(path: Path) -> dict[str, Any] | None:
    """A trial's record; None where there is none, or a damaged one, which is moved aside."""
    return read_json(path, _fault_of, "the trial is made again")


OF_EVERY_RECORD = {"title": str, "factors": dict, "seed": int, "environment": dict, "date": str, "rows": list}
OF_A_STATE = {
    "finished": {"seconds": dict, "about": str, "pictures": list, "details": dict},
    "failed": {"error": str},
}
"""What a record has, and of which type."""

PLAIN = str | int | float | None


def _fault_of(record: Any) -> str | None:
    """What is wrong with a record; None where it is as :meth:`TrialRun.run` writes it."""
    state = record.get("state") if isinstance(record, dict) else None
    if not isinstance(state, str) or state not in OF_A_STATE:
        return "it is no trial's record"
    for key, kind in (OF_EVERY_RECORD | OF_A_STATE[state]).items():
        if not isinstance(record.get(key), kind):
            return f"its {key} is missing or of another type"
    if not all(_is_row(row) for row in record["rows"]):
        return "a row is none"
    if state == "finished" and not record["rows"]:
        return "it has no rows"
    if not all(isinstance(seconds, int | float) for seconds in record.get("seconds", {}).values()):
        return "its seconds are no numbers"
    if not all(isinstance(name, str) and Path(name).name == name for name in record.get("pictures", ())):
        return "a picture is no file's name"
    return None


def _is_row(row: Any) -> bool:
    plain = isinstance(row, dict) and all(isinstance(cell, PLAIN) for cell in row.values())
    numbers = plain and isinstance(row.get("seed"), int) and not isinstance(row.get("value"), str)
    return numbers and isinstance(row.get("metric"), str)


def environment() -> dict[str, Any]:
    """Commit, versions and hardware, for a record and a report."""
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "commit": _commit(),
        "hardware": hardware,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "metamask_plugin": metamask_plugin.__version__,
    }


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of the code that runs, with a + where it was changed since; None outside a clone."""
    folder = Path(metamask_plugin.__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Sends what a trial prints to a file, where several run at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file, contextlib.redirect_stdout(file):
        yield
