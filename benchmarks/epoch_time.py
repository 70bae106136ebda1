"""Seconds an epoch through ``main_pretrain.py``'s own path, and what is reached of the machine's peak.

    python benchmarks/epoch_time.py [--backbone conv4] [--images 512] [--batch 64] [--epochs 3]
    python benchmarks/epoch_time.py data.dataset=cifar10 data.train_path=... data.val_path=null

Every candidate is a run of its own, in turn, round after round: SimCLR + Barlow (``ablation=no_meta``, the
unit) and MetaMask with a meta step every k iterations, on noise in the shape of CIFAR-10 unless overrides say
otherwise. A run's first epoch does not count. With it: the share of time spent waiting for data, a run of 800
epochs projected, the floating-point work of one iteration and the rate it is done at against a large matrix
product of the same precision on the same machine, and what the rest of the time goes to.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from breakdown import count_flops, matrix_peak, time_by_kind
from common import Rounds, Spread, bar_chart, build_model, hardware_line, noise_views, picture, table, write
from iterations import meta_settings, own_precision
from loop import Loop
from peers import PEERS, UNIT
from precision import matrix_precision
from timed_run import NOISE, TimedRun, timed_run

CANDIDATES: dict[str, dict[str, Any] | None] = {
    UNIT: None,
    "MetaMask, k = 1": {},
    "MetaMask, k = 8": {"every_n_steps": 8},
    "MetaMask, k = 4": {"every_n_steps": 4},
    "MetaMask, shared forward, k = 1": {"when": "before_step"},
    "MetaMask, shared forward, k = 8": {"when": "before_step", "every_n_steps": 8},
    "MetaMask, shared forward, k = 4": {"when": "before_step", "every_n_steps": 4},
}
"""Settings of ``method_kwargs.meta``; None: without one. In the order in which time is spent on them."""

SHORT = {f"{'shared,' if 'shared' in name else ''}k={name[-1]}": name for name in CANDIDATES if name != UNIT}
"""Names for the command line."""

LIGHTNING = {"float32": "32-true", "tf32": "32-true", "bf16": "bf16-mixed"}
DTYPES = {"float32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}
PROJECTED = 800


def overrides_of(name: str, args: argparse.Namespace) -> list[str]:
    """A candidate's command line."""
    settings = CANDIDATES[name]
    found = [
        f"data.dataset={NOISE}",
        f"++data.kwargs.images={args.images}",
        "data.train_path=null",
        "data.val_path=null",
        f"backbone.name={args.backbone}",
        f"optimizer.batch_size={args.batch}",
        f"max_epochs={args.epochs}",
        f"precision={LIGHTNING[args.precision]}",
        f"seed={args.seed}",
        "++benchmark=True",
    ]
    if args.compile:
        found.append(f"++performance.compile={args.compile}")
    if args.cuda_graph:
        found.append("++performance.cuda_graph=True")
    if args.precision == "tf32":
        found.append("++performance.matmul_precision=high")
    if settings is None:
        found.append("ablation=no_meta")
    else:
        settings = {**settings, **own_precision(args.precision)}
        found += [f"++method_kwargs.meta.{key}={value}" for key, value in settings.items()]
    return [*found, *args.overrides]


def measure_epochs(args: argparse.Namespace, until: float | None) -> tuple[Rounds, dict[str, TimedRun]]:
    """Median epoch of every run, round after round; and each candidate's last run."""
    wanted = [UNIT, *(SHORT[short] for short in args.candidates)]
    rounds = Rounds(UNIT, {name: [] for name in wanted})
    runs: dict[str, TimedRun] = {}
    for number in range(1, args.rounds + 1):
        for name in list(rounds.seconds):
            if until is not None and time.monotonic() > until and name != UNIT:
                if number == 1:
                    rounds.failed[name] = "no time was left"
                    del rounds.seconds[name]
                continue
            try:
                run = timed_run(overrides_of(name, args))
            except (Exception, SystemExit) as error:  # a setting may not run here; the others can
                if name == UNIT:
                    raise
                rounds.failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"left out: {name}: {rounds.failed[name]}", flush=True)
                del rounds.seconds[name]
                continue
            runs[name] = run
            rounds.seconds[name].append(statistics.median(run.epochs[1:]))
            share = run.data_wait_share
            waiting = "" if share is None else f", {share:.0%} waiting for data"
            print(f"round {number}: {name}: {rounds.seconds[name][-1]:.2f} s an epoch{waiting}", flush=True)
    return rounds, runs


def measure_work(args: argparse.Namespace) -> dict[str, Any]:
    """Floating-point work of an iteration with and without meta step, and where their time goes."""
    views = noise_views(args.batch, 32)
    found: dict[str, Any] = {}
    settings = {
        "SimCLR + Barlow": PEERS[UNIT],
        "MetaMask, k = 1": meta_settings(own_precision(args.precision)),
    }
    torch.backends.cudnn.benchmark = True
    with matrix_precision(args.precision if torch.cuda.is_available() else "float32"):
        for name, overrides in settings.items():
            torch.manual_seed(args.seed)
            plain = Loop(build_model(args.backbone, 32, **overrides), views, args.precision)
            found[name] = {"flops": count_flops(plain.step)}
            del plain
            performance = {"performance__compile": args.compile, "performance__cuda_graph": args.cuda_graph}
            loop = Loop(build_model(args.backbone, 32, **overrides, **performance), views, args.precision)
            for _ in range(5 if args.cuda_graph else 1):
                loop.step()
            found[name]["time"] = time_by_kind(loop.step)
            del loop
        found["matrix_peak"] = matrix_peak(DTYPES[args.precision])
    return found


def summary(
    args: argparse.Namespace, rounds: Rounds, runs: dict[str, TimedRun], work: dict[str, Any] | None
) -> dict[str, Any]:
    """A row a candidate: seconds, ratio, projection, waiting share, FLOP/s and its share of the peak."""
    rows: dict[str, Any] = {}
    for name, values in rounds.seconds.items():
        run = runs[name]
        spread = Spread.of(values)
        rows[name] = {
            "seconds_an_epoch": spread._asdict(),
            "ratio": rounds.ratio(name)._asdict(),
            "hours_of_800_epochs": spread.median * PROJECTED / 3600,
            "images_a_second": run.images / spread.median,
            "data_wait_share": run.data_wait_share,
            "compiled": bool(args.compile),
            "cuda_graph": args.cuda_graph,
        }
        settings = CANDIDATES[name]
        # the counter has seen the plain schedule; a shared forward pass saves one of the encoder
        if work is not None and (settings is None or "when" not in settings):
            plain, meta = (work[key]["flops"] for key in (UNIT, "MetaMask, k = 1"))
            every = 0 if settings is None else 1 / settings.get("every_n_steps", 1)
            rate = run.steps * (plain + every * (meta - plain)) / spread.median
            rows[name] |= {"flops_a_second": rate, "share_of_matrix_peak": rate / work["matrix_peak"]}
    return rows


def epoch_table(rows: dict[str, Any]) -> str:
    def cell(value, form):
        return "-" if value is None else form.format(value)

    lines = [
        [
            name,
            f"{row['seconds_an_epoch']['median']:.2f}",
            f"{row['ratio']['median']:.2f}",
            f"{row['hours_of_800_epochs']:.2f}",
            f"{row['images_a_second']:.0f}",
            "yes" if row["compiled"] else "no",
            cell(row["data_wait_share"], "{:.1%}"),
            cell(row.get("flops_a_second") and row["flops_a_second"] / 1e12, "{:.3g}"),
            cell(row.get("share_of_matrix_peak"), "{:.1%}"),
        ]
        for name, row in rows.items()
    ]
    header = [
        "epoch",
        "s",
        "ratio",
        "h / 800 epochs",
        "images/s",
        "compiled",
        "waiting",
        "TFLOP/s",
        "of matrix peak",
    ]
    return table(header, lines)


def kind_table(work: dict[str, Any]) -> str:
    """Share of an iteration's time by kind, a column an iteration."""
    names = [name for name in work if name != "matrix_peak"]
    kinds = dict.fromkeys(kind for name in names for kind in work[name]["time"]["seconds"])
    rows = []
    for kind in kinds:
        times = [work[name]["time"] for name in names]
        rows.append([kind, *(f"{t['seconds'].get(kind, 0) / sum(t['seconds'].values()):.1%}" for t in times)])
    rows.append(["GFLOP", *(f"{work[name]['flops'] / 1e9:.1f}" for name in names)])
    return table(["one iteration", *names], rows)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    cuda = torch.cuda.is_available()
    add = parser.add_argument
    add("--backbone", default="resnet18" if cuda else "conv4", help="encoder")
    add("--images", type=int, default=50_000 if cuda else 512, help="images of noise in an epoch")
    add("--batch", type=int, default=512 if cuda else 64, help="batch size, images")
    add("--epochs", type=int, default=3, help="epochs of a run, at least 2; the first does not count")
    add("--rounds", type=int, default=1 if cuda else 2, help="runs of every candidate")
    add("--precision", default="bf16" if cuda else "float32", choices=tuple(LIGHTNING), help="of the runs")
    add("--compile", default=False, help="performance.compile: False, True, reduce-overhead")
    add("--cuda-graph", action="store_true", help="performance.cuda_graph")
    add("--candidates", nargs="+", default=list(SHORT), choices=list(SHORT), help="beside the unit")
    add("--no-work", action="store_true", help="neither floating-point work nor profile")
    add("--minutes", type=float, help="begin no further run after so long")
    add("--seed", type=int, default=5, help="of the runs")
    add("--out", type=Path, help="folder for epoch_time.json and epoch_time.png")
    add("overrides", nargs="*", help="further overrides of the config, as for main_pretrain.py")
    args = parser.parse_args(argv)
    if args.epochs < 2:
        parser.error("--epochs must be at least 2, as the first does not count")
    args.compile = {"False": False, "True": True}.get(args.compile, args.compile)
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes

    title = f"{args.backbone}, batch {args.batch}, {args.precision}, {hardware_line()}"
    print(title, flush=True)
    rounds, runs = measure_epochs(args, until)
    work = None
    result = report(args, title, rounds, runs, work)  # at once: the rest may not fit into the time
    if not args.no_work:
        work = measure_work(args)
        result = report(args, title, rounds, runs, work)
        print(f"\nmatrix product: {work['matrix_peak'] / 1e12:.3g} TFLOP/s\n\n{kind_table(work)}")
    return result


def report(
    args: argparse.Namespace,
    title: str,
    rounds: Rounds,
    runs: dict[str, TimedRun],
    work: dict[str, Any] | None,
) -> dict[str, Any]:
    """Prints the table, and writes JSON and picture."""
    rows = summary(args, rounds, runs, work)
    if args.no_work or work is not None:
        print(f"\n{epoch_table(rows)}", flush=True)
    result = {"settings": vars(args), "epochs": rows, "rounds": rounds.record(), "work": work}
    if args.out is not None:
        write("epoch_time", result, args.out)
        bars = {name: Spread(**row["seconds_an_epoch"]) for name, row in rows.items()}
        ratios = {name: Spread(**row["ratio"]) for name, row in rows.items()}
        panels = {"seconds an epoch": bars, f"in epochs of {UNIT}": ratios}
        picture("epoch_time", bar_chart(panels, "median, least and most", title), args.out)
    return result


if __name__ == "__main__":
    main()
