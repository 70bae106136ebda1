"""What a meta step costs, and how far each estimator is from the truth.

    python benchmarks/step_cost.py [--backbone resnet18 conv4] [--batch 16 32] [--precision float32 tf32 bf16]

Four parts, each for every encoder, batch size and precision, by ``--parts``:

- ``meta``: the meta step alone. The unit is one SimCLR + Barlow Twins step (forward and backward of the
  regular loss) of the same model on the same batch.
- ``full``: whole iterations, optimisers included, in units of a whole SimCLR + Barlow iteration; with a meta
  step every k iterations, k of them are timed and their mean is taken. The release computes in float32
  without TensorFloat-32 and uncompiled, as it was published, whatever the others do.
- ``flops``: the floating-point work of the same iterations, counted: what the ratios would be if every
  operation took as long as every other. That is the floor for ``full``.
- ``error``: of the meta-gradient, relative to the unrolled oracle in float64 on the same weights and batch:
  noise through a random initialisation, or a trained checkpoint and its own images (``--checkpoint``).
  Beside it the cosine between the meta-gradients of two independent batches: an error that is small against
  that difference drowns in it.

Every round times the unit and each candidate in turn, so that whatever the machine does meanwhile meets them
all; the ratio is the median over rounds of the quotient within a round.
"""

import argparse
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from breakdown import count_flops
from common import (
    Rounds,
    Spread,
    bar_chart,
    build_model,
    hardware,
    hardware_line,
    noise_views,
    paired_rounds,
    picture,
    table,
    write,
)
from gradient_error import ESTIMATORS, error_setting, error_table, measure_errors
from iterations import FULL, RELEASE, Settings, meta_settings, own_precision
from loop import PRECISIONS, Loop
from matplotlib.figure import Figure
from peers import PEERS, UNIT, Release
from precision import matrix_precision
from trained import backbone_name

from metamask_plugin.bilevel import Exact, InnerStep, PlainStep
from metamask_plugin.methods import MetaMask

PARTS = ("meta", "full", "flops", "error")


def regular_step(model: MetaMask, views: list[torch.Tensor]) -> None:
    """The unit of ``meta``: forward and backward of Eq. (5), without the optimiser."""
    loss, *_ = model.regular_loss({"feats": [model.backbone(x) for x in views]}, model.target_features(views))
    loss.backward()
    model.zero_grad()


def measure_meta(
    backbone: str, batch: int, precision: str, args: argparse.Namespace, until: float | None
) -> Rounds:
    """The meta step alone, by estimator."""
    torch.manual_seed(args.seed)
    model = build_model(backbone, args.size, **meta_settings(own_precision(precision)))
    views = [x.to(memory_format=model.memory_format) for x in noise_views(batch, args.size)]
    trial = InnerStep(PlainStep(args.lr), PlainStep(args.lr))
    problem, half = model.meta_problem(views), model.meta_problem([x[: batch // 2] for x in views])
    loop_precision = torch.autocast(views[0].device.type, torch.bfloat16, enabled=precision == "bf16")

    def unit():
        with loop_precision:
            regular_step(model, views)

    candidates: dict[str, Callable[[], Any]] = {UNIT: unit}
    for name, estimator in ESTIMATORS.items():
        if not (precision == "bf16" and name == "unrolled"):  # it would compute in float32
            candidates[name] = lambda e=estimator: e.gradient(problem, trial)
    candidates |= {
        "exact, nothing reused": lambda: Exact(reuse=False).gradient(problem, trial),
        "exact, half the batch": lambda: Exact().gradient(half, trial),
        "exact, heads alone": lambda: Exact().gradient(problem.frozen_encoder(), trial),
    }
    if precision == "float32":
        release = Release(model.redundancy_head)
        candidates["release"] = lambda: release.gradient(problem, trial)
    with matrix_precision(precision):
        candidates = _wanted(candidates, args.only)
        processor = args.processor_time
        return paired_rounds(candidates, args.rounds, args.repeats, until=until, processor=processor)


def measure_full(
    backbone: str, batch: int, precision: str, args: argparse.Namespace, until: float | None
) -> Rounds:
    """Whole iterations of every peer and every setting."""
    views = noise_views(batch, args.size)
    steps: dict[str, int] = {}

    def lazily(name: str, overrides: Settings, release: bool = False) -> Callable[[], None]:
        computing = "float32" if release else precision
        loops: list[Loop] = []  # made with the first call, which does not count

        def call():
            if not loops:
                torch.manual_seed(args.seed)
                performance = {
                    "performance__compile": args.compile and not release,
                    "performance__cuda_graph": args.cuda_graph and not release,
                }
                model = build_model(backbone, args.size, **overrides, **performance)
                estimator = Release(model.redundancy_head) if release else None
                loops.append(Loop(model, views, computing, estimator))
                steps[name] = max(1, loops[0].meta_every)
            with matrix_precision(computing):
                loops[0].cycle()

        return call

    candidates = {name: lazily(name, overrides) for name, overrides in PEERS.items()}
    # the release's algorithm: momentum in the trial step, finite differences, float32 throughout. Before the
    # others, as its turn to warm up must come before time is over
    candidates[RELEASE] = lazily(RELEASE, meta_settings({"trial": "momentum"}), release=True)
    for name, settings in FULL.items():
        if precision == "bf16" and settings.get("estimator") == "unrolled":  # it would compute in float32
            continue
        settings = {**settings, **own_precision(precision)}
        candidates[name] = lazily(name, meta_settings(settings))
    candidates = _wanted(candidates, args.only)
    processor = args.processor_time
    warmup = max(args.warmup, 5 if args.cuda_graph else 1)  # the fourth meta step is captured
    return paired_rounds(candidates, args.rounds, args.repeats, warmup, steps, until, processor)


def count_work(backbone: str, batch: int, precision: str, args: argparse.Namespace) -> dict[str, Any]:
    """Floating-point operations of whole iterations, by name: of those with a meta step each time.

    Returns:
        ``forward``, F: of the encoder over both views; ``iterations``: of each candidate.
    """
    views = noise_views(batch, args.size)
    iterations: dict[str, int] = {}
    settings = {name: meta_settings({**own, **own_precision(precision)}) for name, own in FULL.items()}
    settings |= {RELEASE: meta_settings({"trial": "momentum"})}
    for name, overrides in {**PEERS, **settings}.items():
        if name.endswith(("k = 4", "k = 8")):
            continue
        model = build_model(backbone, args.size, **overrides)
        estimator = Release(model.redundancy_head) if name == RELEASE else None
        iterations[name] = count_flops(Loop(model, views, precision, estimator).step)
    return {"forward": count_flops(lambda: [model.backbone(x) for x in views]), "iterations": iterations}


def work_table(work: dict[str, Any]) -> str:
    """Work in encoder forwards F, and the ratios it implies with a meta step every k iterations."""
    unit = work["iterations"][UNIT]
    rows = []
    for name, flops in work["iterations"].items():
        floors = [f"{1 + (flops / unit - 1) / k:.2f}" for k in (1, 4, 8)] if name not in PEERS else [""] * 3
        row = [name.removesuffix(", k = 1"), f"{flops / 1e9:.1f}", f"{flops / work['forward']:.2f}"]
        rows.append([*row, *floors])
    return table(["iteration", "GFLOP", "F", "k = 1", "k = 4", "k = 8"], rows)


def _wanted(candidates: dict[str, Any], only: str | None) -> dict[str, Any]:
    return {name: call for name, call in candidates.items() if name == UNIT or re.search(only or "", name)}


def meta_table(rounds: Rounds, errors: dict[str, Any] | None) -> str:
    header = ["estimator", "cost", "range"]
    if errors:
        header += ["error f64", "error f32", "cosine f64"]
    rows = []
    for name, ratio in rounds.ratios().items():
        if name == UNIT:
            continue
        row = [name, f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}"]
        if errors:
            found = errors["estimators"].get(name, {})
            cells = [("float64", "relative", "{:.1e}"), ("float32", "relative", "{:.1e}")]
            for precision, key, form in [*cells, ("float64", "cosine", "{:.3f}")]:
                value = found.get(precision, {}).get(key)
                row.append("" if value is None else form.format(value))
        rows.append(row)
    return table(header, rows)


def full_table(rounds: Rounds) -> str:
    rows = []
    for name, ratio in rounds.ratios().items():
        speed = Spread.of(rounds.seconds[name]).median
        rows.append(
            [name, f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}", f"{1e3 * speed:.1f}"]
        )
    return table(["iteration", "cost", "range", "ms"], rows)


def draw(cell: dict[str, Any], title: str) -> Figure | None:
    """The costs of a cell, side by side; None if there are none."""
    panels: dict[str, dict[str, Spread]] = {}
    for part, label in (("meta", "meta step alone"), ("full", "whole iteration")):
        if part in cell:
            ratios = {name: Spread(**ratio) for name, ratio in cell[part]["ratio"].items()}
            panels[label] = {name: r for name, r in ratios.items() if name != UNIT or part == "full"}
    label = "in SimCLR + Barlow steps"
    return bar_chart(panels, label, title, {"whole iteration": targets()}, reference=1.0) if panels else None


def targets() -> dict[str, float]:
    """What whole iterations are to stay below, by name."""
    wanted = {1: 3.4, 4: 1.7, 8: 1.35} if torch.cuda.is_available() else {4: 1.9}
    kinds = ("exact", "exact, shared forward")
    return {f"{kind}, k = {k}": limit for k, limit in wanted.items() for kind in kinds}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    torch.backends.cudnn.benchmark = True
    # many models of one architecture are compiled in this process: by default the ninth would not be
    torch._dynamo.config.recompile_limit = 128
    grid = [(b, n, p) for b in args.backbone for n in args.batch for p in args.precision]
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "out")}
    result: dict[str, Any] = {"settings": settings, "cells": []}
    for number, (backbone, batch, precision) in enumerate(grid):
        cell = {"backbone": backbone, "batch": batch, "precision": precision}
        result["cells"].append(cell)
        end = _deadline(until, len(grid) - number)
        for _ in measure_cell(cell, args, end):  # a part is written as soon as it is there
            if args.out is not None:
                write("step_cost", result, args.out)
                name = "step_cost" if len(grid) == 1 else f"step_cost_{backbone}_{batch}_{precision}"
                if (figure := draw(cell, _title(cell, args))) is not None:
                    picture(name, figure, args.out)
    if args.json is not None:
        args.json.write_text(json.dumps({"hardware": hardware(), **result}, indent=2, default=str))
    return result


def measure_cell(cell: dict[str, Any], args: argparse.Namespace, until: float | None) -> Iterator[str]:
    """Measures and prints one encoder, batch size and precision; yields when a part of ``cell`` is there."""
    backbone, batch, precision = cell["backbone"], cell["batch"], cell["precision"]
    print(f"\n{_title(cell, args)}, seed {args.seed}", flush=True)
    errors = None
    if "error" in args.parts and precision == args.precision[0]:  # of all precisions at once
        model, views, other = error_setting(backbone, batch, args.size, args.seed, args.checkpoint)
        trial = InnerStep(PlainStep(args.lr), PlainStep(args.lr))
        precisions = list(dict.fromkeys(["float32", *args.precision]))
        cell["error"] = errors = measure_errors(model, views, other, trial, precisions)
        del model
        source = "noise, random initialisation" if args.checkpoint is None else "a checkpoint, its own images"
        print(f"\nmeta-gradient against the unrolled oracle in float64: {source}\n\n{error_table(errors)}")
        print(f"\ncosine between two independent batches: {errors['cosine_between_batches']:.3f}", flush=True)
        yield "error"
    if "flops" in args.parts and precision == args.precision[0]:
        cell["flops"] = count_work(backbone, batch, precision, args)
        print(
            f"\nfloating-point work: the floor of the ratios below\n\n{work_table(cell['flops'])}", flush=True
        )
        yield "flops"
    if precision == "tf32" and not torch.cuda.is_available():
        if {"meta", "full"} & set(args.parts):
            print("tf32 is emulated on the CPU: its errors are measured, its speed is not")
        return
    if "meta" in args.parts:
        end = _deadline(until, 2) if "full" in args.parts else until
        rounds = measure_meta(backbone, batch, precision, args, end)
        cell["meta"] = rounds.record()
        print(f"\ncost: the meta step alone, in SimCLR + Barlow steps, trial step {args.lr}\n")
        print(meta_table(rounds, errors), flush=True)
        yield "meta"
    if "full" in args.parts:
        rounds = measure_full(backbone, batch, precision, args, until)
        cell["full"] = rounds.record()
        print("\ncost: one iteration with its optimisers, in SimCLR + Barlow iterations\n")
        print(full_table(rounds), flush=True)
        yield "full"


def _title(cell: dict[str, Any], args: argparse.Namespace) -> str:
    compiled = f", compile={args.compile}" if args.compile else ""
    compiled += ", meta step as a CUDA graph" if args.cuda_graph else ""
    where = f"{cell['backbone']}, {args.size} px, batch {cell['batch']}, {cell['precision']}"
    return f"{where}{compiled}, {hardware_line()}"


def _deadline(until: float | None, parts: int) -> float | None:
    """The end of the first of so many equal parts of what is left."""
    return None if until is None else time.monotonic() + max(0.0, until - time.monotonic()) / parts


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add(
        "--backbone",
        nargs="+",
        default=["resnet18"],
        help="encoders; with --checkpoint it is the checkpoint's",
    )
    add("--batch", nargs="+", type=int, default=[32], help="batch sizes, images")
    add("--precision", nargs="+", default=["float32"], choices=PRECISIONS, help="precisions")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="what to measure")
    add("--only", help="time the unit and the candidates whose name this regular expression finds")
    add("--size", type=int, default=32, help="side of the images, pixels")
    add("--rounds", type=int, default=5, help="rounds that count")
    add("--repeats", type=int, default=1, help="calls in one timing")
    add("--warmup", type=int, default=1, help="rounds before, of whole iterations")
    add("--minutes", type=float, help="begin no further round after so long")
    add("--processor-time", action="store_true", help="in place of wall time: one thread on a busy machine")
    add("--lr", type=float, default=0.1, help="length of the trial step, of meta step alone and error")
    add(
        "--compile",
        default=False,
        help="performance.compile of whole iterations: False, True, reduce-overhead",
    )
    add("--cuda-graph", action="store_true", help="performance.cuda_graph of whole iterations")
    add(
        "--checkpoint",
        type=Path,
        help="run folder of a MetaMask whose weights and images to take for the error",
    )
    add("--seed", type=int, default=0, help="of weights, noise and order")
    add("--out", type=Path, help="folder for step_cost.json and its pictures")
    add("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args(argv)
    if args.checkpoint is not None:
        args.backbone = [backbone_name(args.checkpoint)]
    args.compile = {"False": False, "True": True}.get(args.compile, args.compile)
    return args


if __name__ == "__main__":
    main()
