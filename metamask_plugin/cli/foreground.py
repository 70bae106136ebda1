"""``main_foreground.py``: checkpoints on full images, foregrounds and backgrounds, as in ICL-MSR's Fig. 1."""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.parsers import foreground as parse_args
from metamask_plugin.cli.paths import made_folder
from metamask_plugin.data.regions import FORMS, REGIONS
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.checkpoints import find_checkpoint, read_args
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.knn import within_bank
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data
from metamask_plugin.evaluation.linear import PROTOCOLS
from metamask_plugin.evaluation.regions import FIT_ON, SETTINGS, region_accuracies, summarise_seeds
from metamask_plugin.evaluation.report import format_table, write_summary
from metamask_plugin.evaluation.semantic_figures import region_bars
from metamask_plugin.host import load_encoder


@dataclass(frozen=True)
class Run:
    """A checkpoint to be tested, and what its ``args.json`` says.

    Attributes:
        checkpoint: the file.
        args: the training config.
        data: the ``data`` node of the evaluation.
        name: of its method, by which runs of several seeds belong together.
        seed: of its training, or None.
        trained_on: the region of the images that it was trained on.
    """

    checkpoint: Path
    args: dict[str, Any]
    data: dict[str, Any]
    name: str
    seed: int | None
    trained_on: str

    @property
    def view(self) -> dict[str, Any]:
        """Crop size, mean and std of the first augmentation."""
        entry = next(iter(self.args.get("augmentations") or []), {})
        return {key: entry.get(key) for key in ("crop_size", "mean", "std")}

    @property
    def data_key(self) -> str:
        """The same for runs that can be tested on the same images."""
        node = {key: value for key, value in self.data.items() if key != "num_workers"}
        return json.dumps([node, self.view], sort_keys=True, default=str)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table, writes ``foreground.json`` and ``foreground.png``; bad input ends with exit code 2.

    Args:
        argv: the command line without the program's name; by default the process's.
    """
    args = parse_args(argv)
    with one_line_errors():
        run(args)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tests every run on every region.

    Args:
        args: see :func:`metamask_plugin.cli.parsers.foreground`.

    Returns:
        What is written to ``foreground.json``: the settings, ``runs`` (a row for each run and region) and
        ``summary`` (a row for each name and region, over the seeds). Accuracies in percent.

    Raises:
        UserError: for anything that the user can mend.
    """
    choose("--fit_on", args.fit_on, FIT_ON)
    choose("--protocol", args.protocol, [*PROTOCOLS, "none"])
    check(args.k >= 1, "--k", ">= 1", args.k)
    check(args.batch_size >= 1, "--batch_size", ">= 1", args.batch_size)
    runs = _runs(args)
    form = _form(args.form, runs)
    own = runs[0].checkpoint.parent if len(runs) == 1 else Path("foreground")
    output = made_folder("--output", args.output or own)
    rows = _test(runs, form, args)
    summary = {
        "dataset": runs[0].data["dataset"],
        "k": args.k,
        "protocol": args.protocol,
        "fit_on": args.fit_on,
        "form": form,
        "runs": rows,
        "summary": summarise_seeds(rows),
    }
    print(f"\n{_table(summary)}\n\n{_legend(summary)}")
    write_summary(output / "foreground.json", summary)
    save(region_bars(summary["summary"]), output / "foreground.png")
    print(f"in {output}: foreground.json, foreground.png")
    return summary


def _runs(args: argparse.Namespace) -> list[Run]:
    """Everything that can be refused before the first encoder is loaded, is refused here."""
    given = {
        "dataset": args.dataset,
        "train_path": args.train_data_path,
        "val_path": args.val_data_path,
        "num_workers": args.num_workers,
    }
    paths = args.pretrained_checkpoint_dir
    names = args.names or [None] * len(paths)
    check(len(names) == len(paths), "--names", f"{len(paths)}, one for each run", len(names))
    runs = [_described(path, name, given) for path, name in zip(paths, names)]
    files = [run.checkpoint.resolve() for run in runs]
    twice = next((str(run.checkpoint) for run, file in zip(runs, files) if files.count(file) > 1), None)
    check(twice is None, "--pretrained_checkpoint_dir", "different runs", twice, "give each once")
    datasets = list(dict.fromkeys(run.data["dataset"] for run in runs))
    remedy = "test them one data set at a time, or give --dataset"
    check(len(datasets) == 1, "--pretrained_checkpoint_dir", "runs on one data set", datasets, remedy)
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.name, run.trained_on), []).append(run)
    for (name, region), group in groups.items():
        seeds = [run.seed for run in group]
        label = f"runs {name!r} trained on {region} images"
        remedy = "give different methods different --names"
        check(len(set(seeds)) == len(seeds), label, "of different seeds", seeds, remedy)
        same = len({run.data_key for run in group}) == 1
        check(same, label, "trained on the same data", "different data options", remedy)
    return runs


def _described(path: Path, name: str | None, given: Mapping[str, Any]) -> Run:
    checkpoint = find_checkpoint(path)
    args = read_args(checkpoint)
    remedy = "give a folder written by main_pretrain.py"
    check(bool(args), f"args.json beside {checkpoint}", "there, with the training config", "none", remedy)
    node = args.get("data") or {}
    run = Run(
        checkpoint=checkpoint,
        args=args,
        data=merged_data(args, given),
        name=str(name or args.get("name") or args.get("method") or checkpoint.parent.name),
        seed=args.get("seed"),
        trained_on=choose(f"data.region of {checkpoint.parent}", node.get("region") or "full", REGIONS),
    )
    crop_size, label = run.view["crop_size"], f"augmentations[0].crop_size of {checkpoint.parent}"
    check(isinstance(crop_size, int), label, "a number of pixels", crop_size, remedy)
    return run


def _form(asked: str | None, runs: Sequence[Run]) -> str:
    """How foregrounds are shown: as asked for, or as in the runs that were trained on them."""
    if asked is not None:
        return choose("--form", asked, FORMS)
    nodes = [run.args.get("data") or {} for run in runs if run.trained_on == "foreground"]
    forms = sorted({node.get("region_form") or "fill" for node in nodes}) or ["fill"]
    check(len(forms) == 1, "--form", "given, as the runs were trained on different ones", forms)
    return choose("--form", forms[0], FORMS)


def _images(data: LabelledImages, form: str, split: str, region: str) -> tqdm:
    """Batches of images, with a bar on a terminal."""
    loader = data.evaluation_loader(split, region=region, form=form)
    return tqdm(loader, f"{region} {split} features", leave=False, disable=not sys.stderr.isatty())


def _test(runs: Sequence[Run], form: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    loaded: dict[str, LabelledImages] = {}
    device = "cuda" if torch.cuda.is_available() else None
    rows = []
    for run in runs:
        if run.data_key not in loaded:
            data = LabelledImages.read(run.data, **run.view, batch_size=args.batch_size)
            data.require_boxes()
            sizes = f"{data.sizes['test']} test and {data.sizes['train']} training images"
            print(f"{run.data['dataset']}: {sizes}", flush=True)
            (args.k,) = within_bank("--k", [args.k], data.sizes["train"])
            loaded[run.data_key] = data
        described = f"{run.name}, seed {run.seed}, trained on {run.trained_on} images"
        print(f"{run.checkpoint}: {described}", flush=True)
        accuracies = region_accuracies(
            load_encoder(run.checkpoint).backbone,
            partial(_images, loaded[run.data_key], form),
            run.trained_on,
            args.fit_on,
            args.k,
            protocol=None if args.protocol == "none" else args.protocol,
            device=device,
        )
        about = {"name": run.name, "seed": run.seed, "trained on": run.trained_on}
        for row in accuracies:
            tested_on = row.pop("tested on")
            setting = SETTINGS.get((run.trained_on, tested_on))
            where = {"tested on": tested_on, "setting": setting}
            rows.append({**about, **where, **row, "checkpoint": str(run.checkpoint)})
    return rows


def _table(summary: Mapping[str, Any]) -> str:
    """A row for each run where there is one of each name, else one for each name with its deviation."""
    rows = summary["runs"]
    if len(summary["summary"]) < len(rows):
        rows = [_with_deviation(row) for row in summary["summary"]]
    rows = [{key: value for key, value in row.items() if key != "checkpoint"} for row in rows]
    return format_table(rows, width=max(80, shutil.get_terminal_size().columns))


def _with_deviation(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = {key: value for key, value in row.items() if not key.endswith("_std")}
    for key in [key for key in shown if f"{key}_std" in row]:
        std = row[f"{key}_std"]
        shown[key] = f"{row[key]:.2f}" if std is None else f"{row[key]:.2f} ± {std:.2f}"
    return shown


def _legend(summary: Mapping[str, Any]) -> str:
    regions = {"trained": "the region that the encoder was trained on", "tested": "the region that is tested"}
    fitted = regions[summary["fit_on"]]
    lines = [
        "accuracies in percent; setting: the number in Figs. 1 and 4 of ICL-MSR (Qiang et al., ICML 2022)",
        f"classifiers learnt from training images of {fitted} (--fit_on {summary['fit_on']})",
        f"foregrounds shown as by --form {summary['form']}",
    ]
    if any(row["n"] > 1 for row in summary["summary"]):
        lines.append("n: number of seeds; ±: sample standard deviation over them")
    return "\n".join(lines)
