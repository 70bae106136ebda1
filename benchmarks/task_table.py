"""Every task alone, with MetaMask and with MSR, on confounded digits: accuracy over seeds, and collapse.

    python benchmarks/task_table.py [--epochs 10] [--seeds 5 6 7] [--tasks simclr byol ...] [--jobs 2]
    python benchmarks/task_table.py --methods baseline --seeds 5 --override data.dataset=digits ~data.kwargs

Each cell is the run of

    python main_pretrain.py --config-name metamask_barlow task=<task> method=baseline
    python main_pretrain.py --config-name metamask_barlow task=<task>
    python main_pretrain.py --config-name icl_msr_simclr task=<task>

with ``max_epochs`` and ``seed`` set, evaluated on unmasked features: kNN (k = 5, cosine), linear probe after
its last epoch, and the spread of the features. Every finished run is written down at once in ``--output``;
the same command goes on where it was interrupted. Runs have one thread each, ``--jobs`` of them at a time.
"""

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
METHODS = {
    "baseline": ("metamask_barlow", ["method=baseline"]),
    "metamask": ("metamask_barlow", []),
    "icl_msr": ("icl_msr_simclr", []),
}
TITLES = {"baseline": "alone", "metamask": "+ MetaMask", "icl_msr": "+ MSR"}


Cell = tuple[str, str, int, int, tuple[str, ...]]
"""Task, method, seed, epochs, further overrides."""


def train_and_evaluate(cell: Cell) -> dict:
    """One run, as the command line makes it."""
    import torch
    from hydra import compose, initialize_config_dir

    from metamask_plugin.cli.pretrain import run

    torch.set_num_threads(1)
    task, method, seed, epochs, further = cell
    config, overrides = METHODS[method]
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *overrides,
            f"task={task}",
            f"seed={seed}",
            f"max_epochs={epochs}",
            f"checkpoint.dir={folder}",
            "accelerator=cpu",
            "++evaluation.enabled=False",
            *further,
        ]
        with initialize_config_dir(str(ROOT / "scripts" / "pretrain"), version_base="1.2"):
            cfg = compose(config, overrides)
        before = time.process_time()
        with contextlib.redirect_stdout(io.StringIO()):
            path = run(cfg).path
        measured = {"training_cpu_seconds": round(time.process_time() - before, 1)}
        measured |= evaluate(path, cfg, seed)
    row = {"task": task, "method": method, "seed": seed, "epochs": epochs, "override": further, **measured}
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def cell_of(row: dict) -> Cell:
    return row["task"], row["method"], row["seed"], row["epochs"], tuple(row.get("override", ()))


def evaluate(folder: Path, cfg, seed: int) -> dict[str, float]:
    """kNN, linear probe and spread of the last epoch's features."""
    from metamask_plugin.data import PretrainDataModule, load_dataset
    from metamask_plugin.evaluation.encoder import load_encoder
    from metamask_plugin.evaluation.features import extract_features, feature_std
    from metamask_plugin.evaluation.knn import knn_table
    from metamask_plugin.evaluation.labelled_images import LabelledImages
    from metamask_plugin.evaluation.linear import linear_probe

    data = LabelledImages.of_run(PretrainDataModule(load_dataset(cfg.data), cfg))
    backbone = load_encoder(folder).backbone
    train, test = (extract_features(backbone, data.evaluation_loader(split)) for split in ("train", "test"))
    knn = knn_table(train, test, ks=(5,), temperature=cfg.evaluation.knn.temperature)
    linear = linear_probe(train, test, 10, cfg.evaluation.linear.protocol, seed=seed)
    return {"knn5": knn["knn5"], "linear": linear.acc1_last, "feature_std": feature_std(test.feats)}


def table(rows: list[dict]) -> str:
    """Markdown: a line a task, mean and sample standard deviation over the seeds."""
    lines = ["| task | " + " | ".join(f"{TITLES[m]}: kNN | linear | std" for m in METHODS) + " |"]
    lines.append("|---|" + "---|" * (3 * len(METHODS)))
    for task in dict.fromkeys(row["task"] for row in rows):
        cells = []
        for method in METHODS:
            runs = [row for row in rows if (row["task"], row["method"]) == (task, method)]
            cells += [spread([run[key] for run in runs]) for key in ("knn5", "linear")]
            cells.append(f"{statistics.mean(run['feature_std'] for run in runs):.2f}" if runs else "-")
        lines.append(f"| {task} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else "-"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from metamask_plugin.tasks import TASKS

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[5, 6, 7])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--override", nargs="+", default=[], help="further key=value of the config")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--output", type=Path, default=Path("task_table.jsonl"))
    args = parser.parse_args()

    done = [json.loads(line) for line in args.output.read_text().splitlines()] if args.output.exists() else []
    rows = {cell_of(row): row for row in done}
    cells: list[Cell] = [
        (task, method, seed, args.epochs, tuple(args.override))
        for seed in args.seeds
        for task in args.tasks
        for method in args.methods
    ]
    missing = [cell for cell in cells if cell not in rows]
    print(f"{len(missing)} of {len(cells)} runs to make, {args.jobs} at a time, {platform.machine()} CPU")
    with multiprocessing.get_context("spawn").Pool(args.jobs) as pool, args.output.open("a") as file:
        for count, row in enumerate(pool.imap_unordered(train_and_evaluate, missing), start=1):
            rows[cell_of(row)] = row
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{count}/{len(missing)}  {row}", flush=True)
    print(f"\n{table([rows[cell] for cell in cells])}")


if __name__ == "__main__":
    main()
