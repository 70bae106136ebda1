"""Peak memory of the plain step, of each estimator's meta step, and of whole iterations.

    python benchmarks/peak_memory.py [--backbone resnet18 conv4] [--batch 16]

On a GPU it is the allocator's peak; on the CPU the bytes of live tensors, counted operator by operator, which
is deterministic (and sees no scratch memory within an operator). Weights, gradients, optimiser state and
images count. The unit is the peak of one SimCLR + Barlow step, forward and backward with its optimiser.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import (
    bar_chart,
    build_model,
    hardware_line,
    noise_views,
    picture,
    table,
    write,
)
from gradient_error import ESTIMATORS
from iterations import FULL, meta_settings, own_precision
from loop import PRECISIONS, Loop
from memory import Memory, peak_memory
from peers import PEERS, UNIT, Release
from precision import matrix_precision

from metamask_plugin.bilevel import Exact, InnerStep, PlainStep

LEFT_OUT = ("k = 4", "k = 8")  # the peak of k iterations is that of the one with the meta step


def meta_candidates(loop: Loop, lr: float = 0.1) -> dict[str, Callable[[], Any]]:
    """The meta step alone, by estimator, on the model and batch of a loop."""
    model, views = loop.model, [x.to(memory_format=loop.model.memory_format) for x in loop.batch[1]]
    trial = InnerStep(PlainStep(lr), PlainStep(lr))
    problem, half = model.meta_problem(views), model.meta_problem([x[: len(x) // 2] for x in views])
    candidates: dict[str, Callable[[], Any]] = {
        name: lambda e=estimator: e.gradient(problem, trial)
        for name, estimator in ESTIMATORS.items()
        if name != "finite difference, r = 1e-4"  # r changes no size
    }
    return candidates | {
        "exact, nothing reused": lambda: Exact(reuse=False).gradient(problem, trial),
        "exact, half the batch": lambda: Exact().gradient(half, trial),
        "exact, heads alone": lambda: Exact().gradient(problem.frozen_encoder(), trial),
        "release": lambda: Release(model.redundancy_head).gradient(problem, trial),
    }


def measure(backbone: str, batch: int, size: int, precision: str = "float32") -> dict[str, dict[str, Memory]]:
    """Peaks of ``plain`` (the unit), ``meta`` (by estimator) and ``full`` (by setting).

    Every peak is taken after an iteration, so that optimiser state is there. A setting or estimator that
    cannot run is named in the output and left out.
    """
    views = noise_views(batch, size)
    found: dict[str, dict[str, Memory]] = {"plain": {}, "meta": {}, "full": {}}
    with matrix_precision(precision):
        for name, overrides in PEERS.items():
            loop = started(backbone, size, views, precision, overrides)
            found["plain"][name] = peak_memory(loop.step, loop.resident())
            del loop
        loop = started(backbone, size, views, precision, meta_settings(own_precision(precision)))
        loop.optimizer.zero_grad()  # as after the optimiser's step of a run: gradients are gone
        for name, call in meta_candidates(loop).items():
            if (memory := _measured(name, call, loop)) is not None:
                found["meta"][name] = memory
        del loop, call
        for name, settings in FULL.items():
            if name.endswith(LEFT_OUT):
                continue
            try:
                overrides = meta_settings({**settings, **own_precision(precision)})
                loop = started(backbone, size, views, precision, overrides)
            except (RuntimeError, ValueError) as error:
                _left_out(name, error)
                continue
            if (memory := _measured(name, loop.step, loop)) is not None:
                found["full"][name.removesuffix(", k = 1")] = memory
            del loop
    return found


def started(backbone: str, size: int, views, precision: str, overrides: dict[str, Any]) -> Loop:
    """A loop that has made an iteration: its optimisers have their state."""
    torch.manual_seed(0)
    loop = Loop(build_model(backbone, size, **overrides), views, precision)
    loop.step()
    return loop


def _measured(name: str, call: Callable[[], Any], loop: Loop) -> Memory | None:
    try:
        return peak_memory(call, loop.resident())
    except RuntimeError as error:  # out of memory, or an operator without a second derivative
        return _left_out(name, error)


def _left_out(name: str, error: Exception) -> None:
    print(f"left out: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}", flush=True)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["resnet18"], help="encoders")
    parser.add_argument("--batch", nargs="+", type=int, default=[16], help="batch sizes, images")
    parser.add_argument("--precision", nargs="+", default=["float32"], choices=PRECISIONS, help="precisions")
    parser.add_argument("--size", type=int, default=32, help="side of the images, pixels")
    parser.add_argument("--out", type=Path, help="folder for peak_memory.json and its pictures")
    args = parser.parse_args(argv)

    cells, panels = [], {}
    for backbone in args.backbone:
        for batch in args.batch:
            for precision in args.precision:
                found = measure(backbone, batch, args.size, precision)
                unit = found["plain"][UNIT].peak
                name = f"{backbone}, batch {batch}, {precision}"
                print(f"\n{name}, {args.size} px, {hardware_line()}; unit {unit / 1e6:.0f} MB\n")
                print(_table(found, unit))
                panels[name] = {
                    **{f"meta step: {key}": memory.peak / unit for key, memory in found["meta"].items()},
                    **{f"iteration: {key}": memory.peak / unit for key, memory in found["full"].items()},
                }
                record = {
                    part: {
                        key: {**memory._asdict(), "ratio": memory.peak / unit}
                        for key, memory in memories.items()
                    }
                    for part, memories in found.items()
                }
                cells.append({"backbone": backbone, "batch": batch, "precision": precision, **record})
    result = {"settings": vars(args), "cells": cells}
    if args.out is not None:
        write("peak_memory", result, args.out)
        title = f"Peak memory, {hardware_line()}"
        figure = bar_chart(panels, "peaks of the SimCLR + Barlow step", title, reference=2.0)
        picture("peak_memory", figure, args.out)
    return result


def _table(found: dict[str, dict[str, Memory]], unit: int) -> str:
    titles = {"plain": "", "meta": "meta step: ", "full": "iteration: "}
    rows = [
        [
            titles[part] + name,
            f"{memory.peak / unit:.2f}",
            f"{memory.peak / 1e6:.0f}",
            f"{memory.resident / 1e6:.0f}",
        ]
        for part, memories in found.items()
        for name, memory in memories.items()
    ]
    return table(["peak", "ratio", "MB", "of it before"], rows)


if __name__ == "__main__":
    main()
