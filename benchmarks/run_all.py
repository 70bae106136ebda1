"""All benchmarks that this machine allows, the most important first, and what they say about the targets.

    python benchmarks/run_all.py [--out benchmarks/results] [--minutes 20]
    python benchmarks/run_all.py --list

Every benchmark runs in a process of its own and within its share of the time; one that fails or does not end
is named, and the others go on. Writes each one's JSON, picture and ``output.txt`` into a folder of its own,
and ``summary.md`` with the table of targets. On a GPU: ResNet-18 at batch 512 in bf16, compiled and not,
against the release in its float32. On the CPU: ratios at small sizes.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from claims import claims
from common import hardware_line

HERE = Path(__file__).resolve().parent
MAIN_ROWS = r"^(exact$|exact,\s(shared\sforward,\s)?k|release)"
"""The rows that the targets are about, as a regular expression without a space."""

STOPS_BY_ITSELF = ("step_cost.py", "epoch_time.py", "scaling.py", "input_pipelines.py")
"""Scripts that take ``--minutes``."""


@dataclass
class Job:
    """One benchmark.

    Attributes:
        name: of its folder of results.
        command: script and arguments.
        share: of the time, in relation to the others.
    """

    name: str
    command: list[str]
    share: float


def jobs(kind: str) -> list[Job]:
    """By kind, ``cuda``, ``cpu`` or ``smoke``, in order of importance."""
    errors = "step_cost.py --parts error --precision float32 tf32 bf16 --backbone resnet18 --batch"
    if kind == "cuda":
        steps = "step_cost.py --backbone resnet18 --batch 512 --repeats 3 --rounds 3"
        epochs = "epoch_time.py --backbone resnet18 --batch 512 --precision bf16 --epochs 2"
        found = [
            _job("step_cost", f"{steps} --precision bf16 --parts full --cuda-graph --only {MAIN_ROWS}", 1),
            _job("epoch_time", f"{epochs} --cuda-graph", 2),
            _job("step_cost_launched", f"{steps} --precision bf16 --parts meta full", 1.7),
            _job(
                "step_cost_compiled",
                f"{steps} --precision bf16 --parts full --cuda-graph --compile True --only {MAIN_ROWS}",
                1.5,
            ),
            _job("peak_memory", "peak_memory.py --backbone resnet18 --batch 512 --precision bf16", 0.6),
            _job("epoch_time_compiled", f"{epochs} --cuda-graph --compile True --candidates k=1 k=8", 1.5),
            _job("input_pipelines", "input_pipelines.py --cases cifar --rounds 2 --seconds 2", 0.8),
            _job("step_cost_float32", f"{steps} --precision float32 tf32 --parts full --only {MAIN_ROWS}", 1),
            _job("meta_gradient_error", f"{errors} 64", 0.8),
        ]
        return found + ([_job("scaling", "scaling.py", 2)] if torch.cuda.device_count() > 1 else [])
    if kind == "smoke":
        rows = f"--rounds 1 --only {MAIN_ROWS}"
        return [
            _job("step_cost", f"step_cost.py --backbone conv4 --batch 4 --size 16 {rows}", 2),
            _job("peak_memory", "peak_memory.py --backbone conv4 --batch 4 --size 16", 1),
            _job("epoch_time", "epoch_time.py --images 16 --batch 8 --epochs 2 --rounds 1", 2),
        ]
    return [
        _job("step_cost", "step_cost.py --backbone resnet18 --batch 16 --rounds 4", 5),
        _job("peak_memory", "peak_memory.py --backbone resnet18 conv4 --batch 8", 1.5),
        _job("input_pipelines", "input_pipelines.py --rounds 3", 2),
        _job("epoch_time", "epoch_time.py --backbone conv4 --rounds 2", 3),
        _job("meta_gradient_error", f"{errors} 8", 1),
        _job("scaling", "scaling.py --rounds 1", 3),
    ]


def _job(name: str, command: str, share: float) -> Job:
    return Job(name, command.split(), share)


def run(job: Job, out: Path, limit: float) -> str:
    """Runs one benchmark within ``limit`` seconds; returns what became of it."""
    command = [sys.executable, "-W", "ignore", str(HERE / job.command[0]), *job.command[1:]]
    command += ["--out", str(out / job.name)]
    if (
        job.command[0] in STOPS_BY_ITSELF
    ):  # what was begun is finished, and Python has started before: not all of the time
        command += ["--minutes", f"{0.75 * limit / 60:.2f}"]
    (out / job.name).mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    output = out / job.name / "output.txt"
    with output.open("w") as file:  # as it comes: what a stopped one has said is there
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(timeout=limit)
            outcome = "done" if code == 0 else f"failed, exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # a session of its own: with whatever it has started
            process.wait()
            outcome = f"stopped after {limit:.0f} s"
    said = output.read_text(errors="replace")
    print(said, end="", flush=True)
    if outcome.startswith("failed") and said.strip():
        outcome += f": {said.strip().splitlines()[-1][:200]}"
    return f"{outcome} ({time.monotonic() - started:.0f} s)"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "results", help="folder for everything that is written")
    add("--minutes", type=float, default=30.0, help="for all of it")
    add("--only", nargs="+", help="benchmarks by name")
    add(
        "--smoke",
        action="store_true",
        help="the smallest sizes: shows that everything runs, measures nothing",
    )
    add("--list", action="store_true", help="name what would be run, and run nothing")
    args = parser.parse_args(argv)
    kind = "smoke" if args.smoke else "cuda" if torch.cuda.is_available() else "cpu"
    todo = [job for job in jobs(kind) if args.only is None or job.name in args.only]
    if args.list:
        print("\n".join(f"{job.name:22}python benchmarks/{' '.join(job.command)}" for job in todo))
        return 0
    until = time.monotonic() + 60 * args.minutes
    outcomes: dict[str, str] = {}
    for index, job in enumerate(todo):
        left = until - time.monotonic()
        limit = left * job.share / sum(other.share for other in todo[index:])
        if limit < 5:
            outcomes[job.name] = "not begun: no time was left"
            continue
        print(f"\n=== {job.name}, at most {limit:.0f} s", flush=True)
        outcomes[job.name] = run(job, args.out, limit)
        print(f"=== {job.name}: {outcomes[job.name]}", flush=True)
        (args.out / "summary.md").write_text(summary(args.out, outcomes))
    print(f"\n{summary(args.out, outcomes)}")
    return int(not any(outcome.startswith("done") for outcome in outcomes.values()))


def summary(out: Path, outcomes: dict[str, str]) -> str:
    """Markdown: the targets, and what ran."""
    lines = [
        f"# Benchmarks: {hardware_line()}",
        "",
        "| target | wanted | measured | met |",
        "|---|---|---|---|",
    ]
    lines += [f"| {claim.what} | {claim.wanted} | {claim.measured} | {claim.met} |" for claim in claims(out)]
    lines += ["", "| benchmark | outcome |", "|---|---|"]
    lines += [f"| {name} | {outcome} |" for name, outcome in outcomes.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
