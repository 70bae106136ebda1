"""From the trials' records to what a study leaves: rows, statistics, tables, figures, the report."""

import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from omegaconf import OmegaConf

from metamask_plugin.errors import UserError, choose
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.mask_figures import confounder_scatter, encoder_scatter, random_mask_scatter
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.studies import figures
from metamask_plugin.studies.report import Picture, Report, TrialLine, write_index, write_report
from metamask_plugin.studies.spec import Study
from metamask_plugin.studies.statistics import paired, summarise
from metamask_plugin.studies.tables import Table, markdown, tables, write_rows
from metamask_plugin.studies.trial import TrialRun, environment, read_record
from metamask_plugin.studies.verdicts import verdicts

Row = Mapping[str, Any]
Record = Mapping[str, Any]

MASK_FIGURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "mask_scatter": random_mask_scatter,
    "mask_encoders": encoder_scatter,
    "mask_confounders": confounder_scatter,
}
"""Figures of MetaMask's Figs. 2, 8 and 9, by the ``kind`` of their layout."""

MASK_ALT = "Each point is the accuracy under one mask over the dimensions; the line is the unmasked accuracy."


def write_results(study: Study, runs: Sequence[TrialRun]) -> Path:
    """Writes everything that the finished trials have to say, and the index of all studies beside it.

    ``results.csv`` and ``results.json`` (tidy rows), ``statistics.json`` (means, intervals, paired
    differences), ``tables.md``, ``figure<n>.png``, ``report.html``.

    Args:
        study: the study.
        runs: all its trials, finished or not.

    Returns:
        The report's path.
    """
    records = [run.record for run in runs]
    _say_left_out(study, runs)
    rows = [row for record in records if record is not None for row in record["rows"]]
    summary = summarise(rows, study.factors)
    differences = paired(rows, study.factors, study.baseline) if study.baseline else []
    write_rows(rows, study.folder)
    write_summary(study.folder / "statistics.json", {"summary": summary, "differences": differences})
    shown = _tables(study, summary, study.paper)
    write_whole(study.folder / "tables.md", "\n".join(markdown(table) for table in shown))
    pictures = [*_figures(study, rows), *_trial_pictures(study, runs)]
    report = Report(
        title=study.title if study.size == "paper" else f"{study.title} ({study.size})",
        source=study.source,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        claim=study.claim,
        ran=_ran(study, records),
        verdicts=[*_comparisons(study, differences), *_findings(records)],
        tables=shown,
        differences=_tables(study, differences, ()),
        baseline=", ".join(str(level) for level in (study.baseline or {}).values()),
        figures=pictures,
        arms=_arms(study),
        settings=OmegaConf.to_yaml(OmegaConf.create(dict(study.config))),
        trials=[_line(run, record) for run, record in zip(runs, records)],
        environment=_environment(records),
    )
    path = write_report(study.folder / "report.html", report)
    write_index(study.folder.parent)
    return path


def _say_left_out(study: Study, runs: Sequence[TrialRun]) -> None:
    """The report is about this command's trials: says so where the folder has finished ones of others."""
    own = {run.record_path for run in runs}
    others = [path for path in (study.folder / "trials").glob("*.json") if path not in own]
    records = [record for record in map(read_record, others) if record and record["state"] == "finished"]
    if not records:
        return
    seeds = sorted({record["seed"] for record in records} - set(study.seeds))
    both = ",".join(map(str, sorted({*study.seeds, *seeds})))
    remedy = f"; seeds=[{both}] reports on all seeds" if seeds else ""
    print(
        f"note: the report leaves out {len(records)} finished trials in {study.folder} whose seeds or "
        f"settings are not this command's{remedy}"
    )


def _tables(study: Study, entries: Sequence[Row], paper: Sequence[Row]) -> list[Table]:
    """The tables that the study's layouts ask for; those without a number are left out."""
    if not entries:
        return []
    found = [table for layout in study.tables for table in tables(layout, entries, paper, study.factors)]
    return [
        table for table in found if any(cell.mean is not None for _, cells in table.rows for cell in cells)
    ]


def _figures(study: Study, rows: Sequence[Row]) -> Iterator[Picture]:
    """Draws the study's figures, as far as there is anything to draw."""
    drawn = (drawing for layout in study.figures for drawing in _drawings(study, layout, rows))
    for number, (title, alt, figure) in enumerate(drawn, start=1):
        path = study.folder / f"figure{number}.png"
        save(figure, path)
        yield Picture(title, alt, path)


def _drawings(
    study: Study, layout: Mapping[str, Any], rows: Sequence[Row]
) -> Iterator[tuple[str, str, Figure]]:
    kind = choose("figures.kind", layout.get("kind"), [*figures.KINDS, *MASK_FIGURES])
    if kind in MASK_FIGURES:
        points = [row for row in rows if row["metric"] == "masked"]
        for classifier in dict.fromkeys(row["classifier"] for row in points):
            # what these figures call the metric is here the classifier
            chosen = [{**row, "metric": classifier} for row in points if row["classifier"] == classifier]
            yield f"{study.title}, {classifier}", MASK_ALT, MASK_FIGURES[kind](chosen)
    elif any(row["metric"] == layout.get("metric") for row in rows):
        figure = figures.draw(layout, rows, study.paper, study.factors)
        yield study.title, figures.describe(layout, rows, study.factors), figure


def _trial_pictures(study: Study, runs: Iterable[TrialRun]) -> Iterator[Picture]:
    """What the measures drew of the first seed's encoders; the other seeds' lie beside their records."""
    for run in runs:
        record = run.record if run.trial.seed == study.seeds[0] else None
        for name in () if record is None or record["state"] != "finished" else record["pictures"]:
            path = run.record_path.parent / name
            picture = Picture(run.trial.title, f"A picture of the encoder {run.trial.title}.", path)
            try:
                picture.embedded()
            except UserError as error:  # a picture that was lost must not cost the report
                print(f"warning: left out of the report: {error}", file=sys.stderr)
                continue
            yield picture


def _comparisons(study: Study, differences: Sequence[Row]) -> list[str]:
    metrics = [metric for layout in study.tables for metric in layout.get("metrics") or [layout["metric"]]]
    wanted = list(dict.fromkeys(metrics))
    return verdicts(differences, study.baseline, wanted) if study.baseline else []


def _findings(records: Iterable[Record | None]) -> Iterator[str]:
    """What measures say in words: the audit's verdict."""
    found = [record for record in records if record is not None and record.get("details")]
    for record in found:
        title = f"{record['title']}: " if len(found) > 1 else ""
        for details in record["details"].values():
            for line in details.get("verdict") or ():
                yield title + line


def _ran(study: Study, records: Iterable[Record | None]) -> str:
    done = [record for record in records if record is not None and record["state"] == "finished"]
    size = {
        "paper": "The paper's settings, with what is listed under Settings",
        "digits": "Reduced to the embedded data set and a short training",
        "smoke": "Two steps of training: these numbers mean nothing but that everything runs",
    }
    what = size.get(study.size, study.size)
    if all(trial.checkpoint for trial in study.trials):
        what = "Encoders that were there already: nothing was trained"
    words = [f"{what}. Seeds {', '.join(map(str, study.seeds))}."]
    for about in dict.fromkeys(record["about"] for record in done):
        words.append(f"{about}.")
    if study.config.get("overrides"):
        words.append(f"Changed for all trials: {shlex.join(study.config['overrides'])}.")
    return " ".join(words)


def _arms(study: Study) -> list[tuple[str, str, str]]:
    """What each level of each factor changes: what all trials with it have, and not all without."""
    arms = []
    for factor in study.factors:
        for level in dict.fromkeys(trial.factors[factor] for trial in study.trials):
            having = [set(_changes(trial)) for trial in study.trials if trial.factors[factor] == level]
            lacking = [set(_changes(trial)) for trial in study.trials if trial.factors[factor] != level]
            common = set.intersection(*having) - (set.intersection(*lacking) if lacking else set())
            first = next(trial for trial in study.trials if trial.factors[factor] == level)
            words = [word for word in dict.fromkeys(_changes(first)) if word in common]
            arms.append((factor, str(level), shlex.join(words)))
    return arms


def _changes(trial: Any) -> list[str]:
    words = [trial.checkpoint] if trial.checkpoint else [trial.config, *trial.overrides]
    return [*words, *([f"max_epochs x {trial.epochs:.3g}"] if trial.epochs != 1 else [])]


def _line(run: TrialRun, record: Record | None) -> TrialLine:
    if record is None:
        return TrialLine(run.trial.title)
    seconds = record.get("seconds")
    return TrialLine(
        run.trial.title,
        record["state"],
        record["command"],
        None if seconds is None else sum(seconds.values()),
        record.get("error"),
        record["date"],
    )


def _environment(records: Iterable[Record | None]) -> dict[str, str]:
    """Of all trials; where they differ, all values."""
    known = [record["environment"] for record in records if record is not None] or [environment()]
    return {key: ", ".join(dict.fromkeys(str(one.get(key)) for one in known)) for key in known[0]}
