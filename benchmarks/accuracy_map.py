"""What the cheaper meta steps cost and what they reach: accuracy against cost on confounded digits.

    python benchmarks/accuracy_map.py [--epochs 10] [--seeds 5 6 7] [--jobs 2] [--out results]

Every row is MetaMask's quick start with another meta step, ``max_epochs`` and ``seed`` set. Its cost is the
processor time of the training, on one thread, in units of the run without a meta step of the same seed;
processor time stands still while other work has the core. Every finished run is written down at once; the
same command goes on where it was interrupted.
"""

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path

from task_table import Cell, cell_of, spread, train_and_evaluate

META = "method_kwargs.meta."
WITHOUT = "without meta step"
VARIANTS: dict[str, list[str]] = {
    WITHOUT: ["ablation=no_meta"],
    "exact, k = 1": [f"{META}every_n_steps=1"],
    "exact, k = 2 (shipped)": [],
    "exact, k = 4": [f"{META}every_n_steps=4"],
    "exact, k = 8": [f"{META}every_n_steps=8"],
    "shared pass, k = 1": [f"++{META}when=before_step", f"{META}every_n_steps=1"],
    "shared pass, k = 2": [f"++{META}when=before_step"],
    "half of the batch, k = 2": [f"++{META}batch_share=0.5"],
    "heads alone, k = 2": [f"++{META}trial_on=heads"],
    "first order, k = 2": ["ablation=first_order"],
    "finite difference r = 1e-2, k = 2": ["ablation=finite_difference"],
}
"""By title, what is laid over the quick start's config."""


def summary(rows: dict[Cell, dict], cells: dict[str, list[Cell]]) -> list[dict]:
    """One record a variant: cost relative to the run without a meta step, accuracies, over the seeds."""
    records = []
    for title, runs in cells.items():
        found = [
            (rows[cell], rows[base])
            for cell, base in zip(runs, cells[WITHOUT])
            if cell in rows and base in rows
        ]
        if found:
            costs = [row["training_cpu_seconds"] / base["training_cpu_seconds"] for row, base in found]
            records.append(
                {
                    "meta step": title,
                    "cost": statistics.median(costs),
                    "costs": costs,
                    **{key: [row[key] for row, _ in found] for key in ("knn5", "linear")},
                }
            )
    return records


def markdown(records: list[dict]) -> str:
    lines = ["| meta step | cost | kNN 5 | linear |", "|---|---|---|---|"]
    for record in records:
        accuracies = " | ".join(spread(record[key]) for key in ("knn5", "linear"))
        lines.append(f"| {record['meta step']} | {record['cost']:.2f} | {accuracies} |")
    return "\n".join(lines)


def figure(records: list[dict]):
    """Accuracy against cost, mean and standard deviation over the seeds."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, (key, title) in zip(drawn.subplots(1, 2), (("knn5", "kNN, k = 5"), ("linear", "linear probe"))):
        for number, record in enumerate(records, start=1):
            values = record[key]
            error = statistics.stdev(values) if len(values) > 1 else 0
            axes.errorbar(
                record["cost"],
                statistics.mean(values),
                error,
                marker="o",
                capsize=2,
                linewidth=0.9,
                color=colormaps["tab20"](number - 1),
                label=f"{number}  {record['meta step']}",
            )
            axes.annotate(
                str(number),
                (record["cost"], statistics.mean(values)),
                (5, 3),
                textcoords="offset points",
                fontsize=8,
            )
        axes.set_xlabel("training cost, runs without a meta step")
        axes.set_ylabel(f"{title}, percent")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return drawn


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[5, 6, 7])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    parser.add_argument("--out", type=Path, default=Path("benchmark_results"))
    args = parser.parse_args()

    from common import picture, write

    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "accuracy_map.jsonl"
    done = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    rows = {cell_of(row): row for row in done}
    cells = {
        title: [("simclr", "metamask", seed, args.epochs, tuple(overrides)) for seed in args.seeds]
        for title, overrides in VARIANTS.items()
    }
    # seed by seed, so that an interrupted map has whole rows
    missing = [cell for column in zip(*cells.values()) for cell in column if cell not in rows]
    print(f"{len(missing)} of {len(args.seeds) * len(cells)} runs to make, {args.jobs} at a time", flush=True)
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, log.open("a") as file:
        for count, row in enumerate(pool.imap_unordered(train_and_evaluate, missing), start=1):
            rows[cell_of(row)] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{count}/{len(missing)}  {row}", flush=True)
    records = summary(rows, cells)
    write("accuracy_map", {"seeds": args.seeds, "epochs": args.epochs, "rows": records}, args.out)
    picture("accuracy_map", figure(records), args.out)
    print(f"\n{markdown(records)}")


if __name__ == "__main__":
    main()
