"""One process against several: images a second through Lightning's DistributedDataParallel.

    python benchmarks/scaling.py [--processes 1 2] [--batch 64] [--backbone conv4]

Two ways to add a process: the same joint batch, of which each takes its share, and the same batch each. Every
candidate is a run of ``main_pretrain.py``'s own path in processes of its own, in turn, round after round; a
run's first epoch does not count. On the CPU every process has one thread and they speak gloo; on GPUs each
has one, and they speak NCCL.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Spread, bar_chart, hardware_line, picture, table, write
from timed_run import NOISE, timed_run

METHODS = {"SimCLR + Barlow": ["ablation=no_meta"], "MetaMask": []}
MARK = "images a second:"


class Cell(NamedTuple):
    """A candidate: processes, images in each one's batch, and the method."""

    processes: int
    batch: int
    method: str

    def title(self, joint: int) -> str:
        """Relative to a single process with ``joint`` images."""
        if self.processes == 1:
            return "1 process"
        return (
            f"{self.processes} processes, {'same joint batch' if self.batch < joint else 'same batch each'}"
        )


def cells(processes: list[int], batch: int) -> list[Cell]:
    """All candidates; those of one process, the units, come first."""
    found = []
    for method in METHODS:
        found.append(Cell(1, batch, method))
        for count in processes:
            if count > 1:
                found += [Cell(count, batch // count, method), Cell(count, batch, method)]
    return found


def overrides_of(cell: Cell, args: argparse.Namespace) -> list[str]:
    """A candidate's command line."""
    cuda = torch.cuda.is_available()
    return [
        f"data.dataset={NOISE}",
        f"++data.kwargs.images={args.images}",
        "data.train_path=null",
        "data.val_path=null",
        f"backbone.name={args.backbone}",
        f"optimizer.batch_size={cell.batch}",
        f"max_epochs={args.epochs}",
        f"accelerator={'gpu' if cuda else 'cpu'}",
        f"devices='{cell.processes}'",
        f"strategy={'ddp' if cell.processes > 1 else 'auto'}",
        f"precision={'bf16-mixed' if cuda else '32-true'}",
        *METHODS[cell.method],
        *args.overrides,
    ]


def images_a_second(overrides: list[str], threads: int | None) -> float | None:
    """One run in processes of its own; None, with its last line printed, if it fails."""
    environment = dict(os.environ)
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    command = [sys.executable, str(Path(__file__).resolve()), "--child", *overrides]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode == 0 and lines:
        return float(lines[-1].removeprefix(MARK))
    said = (done.stderr or done.stdout).strip().splitlines()
    print(f"left out: {said[-1] if said else f'exit code {done.returncode}'}", flush=True)
    return None


def child(overrides: list[str]) -> None:
    """What a candidate's processes do; the first one reports."""
    run = timed_run(overrides)
    if run.rank_zero:
        print(MARK, run.images / statistics.median(run.epochs[1:]), flush=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    default = sorted({1, torch.cuda.device_count()}) if cuda else [1, 2]
    add("--processes", nargs="+", type=int, default=default, help="numbers of processes")
    add("--batch", type=int, default=512 if cuda else 64, help="images of a single process's batch")
    add("--backbone", default="resnet18" if cuda else "conv4", help="encoder")
    add("--images", type=int, default=50_000 if cuda else 256, help="images of noise in an epoch")
    add("--epochs", type=int, default=2, help="epochs of a run, at least 2; the first does not count")
    add("--rounds", type=int, default=1 if cuda else 2, help="runs of every candidate")
    add("--minutes", type=float, help="begin no further run after so long")
    add("--out", type=Path, help="folder for scaling.json and scaling.png")
    add("--child", action="store_true", help=argparse.SUPPRESS)
    add("overrides", nargs="*", help="further overrides of the config, as for main_pretrain.py")
    args = parser.parse_args(argv)
    if args.child:
        child(args.overrides)
        return {}
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes

    title = f"{args.backbone}, {hardware_line()}" + ("" if cuda else ", 1 thread a process")
    print(title, flush=True)
    speeds: dict[Cell, list[float]] = {cell: [] for cell in cells(args.processes, args.batch)}
    for number in range(args.rounds):
        for cell in list(speeds):
            if number > 0 and until is not None and time.monotonic() > until:
                break
            speed = images_a_second(overrides_of(cell, args), None if cuda else 1)
            if speed is None:
                del speeds[cell]
                continue
            speeds[cell].append(speed)
            print(f"{cell.method}: {cell.title(args.batch)}: {speed:.0f} images/s", flush=True)
    ratios = {
        cell: Spread.of(ours / one for ours, one in zip(values, speeds[Cell(1, args.batch, cell.method)]))
        for cell, values in speeds.items()
        if values and speeds.get(Cell(1, args.batch, cell.method))
    }
    rows = [
        [
            f"{cell.method}: {cell.title(args.batch)}",
            cell.batch,
            f"{Spread.of(speeds[cell]).median:.0f}",
            ratio,
        ]
        for cell, ratio in ratios.items()
    ]
    print(f"\n{table(['images a second', 'batch each', 'images/s', 'to 1 process'], rows)}")
    result = {
        "settings": vars(args),
        "cells": [
            {**cell._asdict(), "images_a_second": speeds[cell], "ratio": ratio._asdict()}
            for cell, ratio in ratios.items()
        ],
    }
    if args.out is not None and ratios:
        write("scaling", result, args.out)
        panels: dict[str, dict[str, Spread]] = {}
        for cell, ratio in ratios.items():
            panels.setdefault(cell.method, {})[cell.title(args.batch)] = ratio
        label = "images a second, relative to one process"
        picture("scaling", bar_chart(panels, label, title, reference=1.0), args.out)
    return result


if __name__ == "__main__":
    main()
