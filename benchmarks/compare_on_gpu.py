"""All methods side by side in a short training on one GPU: CIFAR-10, ResNet-18, batch 512, equal epochs.

    python benchmarks/compare_on_gpu.py DATA --out FOLDER [--epochs 10] [--seeds 5 6] [--arms SimCLR ...]

DATA has ``train/`` and ``test/``, one folder a class. Runs share the GPU, ``--parallel`` at a time: their
seconds mean nothing, their accuracies are those of runs alone. After ``--minutes`` no new run begins, and
what is unfinished is stopped; the same call goes on. Writes JSON, a file a run and ``comparison.json``.

Every arm but the release's trains with AdamW at 3e-3 and tau 0.2, as ``comparison_gpu``; the release's has
its own settings, and a control of its own. Accuracies are those of the last epoch: kNN by the release's
protocol (k = 5, votes exp(cosine), of masked and of unmasked features) and with temperature 0.07; and a
linear probe (SGD, 100 epochs).
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from common import table, write
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS
from metamask_plugin.cli import pretrain
from metamask_plugin.cli.config import complete, with_own_task_settings
from metamask_plugin.data import PretrainDataModule, load_dataset
from metamask_plugin.data.registry import DATASETS
from metamask_plugin.data.splits import MemoryImages
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.knn import knn_table
from metamask_plugin.evaluation.linear import linear_probe
from metamask_plugin.studies.subject import subject_of_run

METAMASK, ICL_MSR = "cifar/metamask_barlow", "cifar/icl_msr_simclr"
COMMON = ["data.dataset=cifar10", "data.pipeline=kornia", "optimizer.batch_size=512", "precision=bf16-mixed"]
COMMON += ["performance.cuda_graph=True", "benchmark=True", "evaluation.enabled=False"]
SHORT = ["optimizer.name=adamw", "optimizer.lr=1.5e-3", "optimizer.classifier_lr=1.5e-3"]
SHORT += ["optimizer.weight_decay=1e-4", "scheduler.name=warmup_cosine", "scheduler.warmup_epochs=1"]
SHORT += ["method_kwargs.task_kwargs.temperature=0.2", "method_kwargs.task_kwargs.proj_output_dim=128"]
SHORT += ["method_kwargs.task_kwargs.proj_hidden_dim=2048"]
MASKED = [*SHORT, "~optimizer.kwargs"]
META = [
    "method_kwargs.meta.precision=bf16",
    "method_kwargs.meta.inner_lr=null",
    "method_kwargs.meta.trial=auto",
]
ARMS: dict[str, tuple[str, list[str]]] = {
    "release": (METAMASK, ["ablation=official", "method_kwargs.meta.precision=bf16"]),
    "SimCLR + MSR, k = 4": (ICL_MSR, [*SHORT, *META, "method_kwargs.meta.every_n_steps=4"]),
    "MetaMask, k = 4": (METAMASK, [*MASKED, *META, "method_kwargs.meta.every_n_steps=4"]),
    "random mask, k = 4": (
        METAMASK,
        [*MASKED, "ablation=random_mask", *META, "method_kwargs.meta.every_n_steps=4"],
    ),
    "SimCLR + Barlow Twins": (METAMASK, [*MASKED, "ablation=no_meta"]),
    "SimCLR": (METAMASK, [*MASKED, "method=baseline"]),
    "SimCLR, MSR's views": (ICL_MSR, [*SHORT, "method=baseline"]),
    "release without meta step": (METAMASK, ["ablation=official", "method_kwargs.meta.enabled=False"]),
}
"""By name: config and overrides. The longest first."""


def config(arm: str, seed: int, args: argparse.Namespace):
    """An arm's composed config."""
    name, overrides = ARMS[arm]
    own = [f"max_epochs={args.epochs}", f"seed={seed}", f"checkpoint.dir={args.out / 'runs'}"]
    own += [
        f"data.{split}_path={args.data / folder}" for split, folder in (("train", "train"), ("val", "test"))
    ]
    own = [
        word if word.startswith("~") else f"++{word}" for word in [*COMMON, *overrides, *own, *args.overrides]
    ]
    groups = ("++ablation=", "++method=baseline")
    own = [word.removeprefix("++") if word.startswith(groups) else word for word in own]
    with initialize_config_dir(str(SCRIPTS / "pretrain"), version_base="1.2"):
        cfg = compose(name, own)
    OmegaConf.set_struct(cfg, False)
    return cfg


def decode(args: argparse.Namespace) -> Path:
    """Decodes the images once for all runs."""
    path = args.out / "images.pt"
    if not path.exists():
        cfg = complete(with_own_task_settings(config("SimCLR", 0, args)))
        dataset = PretrainDataModule(load_dataset(cfg.data), cfg).dataset
        torch.save([vars(dataset.train), vars(dataset.test)], path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    return path


def decoded(path: Path):
    """The splits from :func:`decode`, in place of the files."""
    splits = []
    for values in torch.load(path, weights_only=True):
        split = MemoryImages(values["images"], values["labels"], values["classes"])
        splits.append(split)
    return tuple(splits)


def run(arm: str, seed: int, args: argparse.Namespace) -> dict:
    """Trains and measures one arm."""
    splits = decoded(decode(args))
    DATASETS["cifar10"] = lambda node: splits
    folder = pretrain.run(config(arm, seed, args))
    subject = subject_of_run(folder, seed, arm)
    train, test = subject.features("train"), subject.features("test")
    released = knn_table(train, test, subject.mask, (5,), temperature=1.0, device=subject.device)
    found = {f"{name}, T = 1": value for name, value in released.items()}
    found |= knn_table(train, test, subject.mask, (20, 200), device=subject.device)
    found["linear"] = linear_probe(train, test, 10, "solo", seed=seed, device="cpu").acc1_last
    last = subject.history()[-1]
    found |= {key: float(last[key]) for key in ("train_task_loss", "train_outer_loss") if last.get(key)}
    return {"arm": arm, "seed": seed, "epochs": args.epochs, **found}


def record_path(arm: str, seed: int, args: argparse.Namespace) -> Path:
    stem = "".join(letter if letter.isalnum() else "_" for letter in arm)
    return args.out / "records" / f"{stem}-{seed}-{args.epochs}.json"


def run_all(args: argparse.Namespace) -> int:
    """Every arm and seed, several at a time, until all are there or time is up; returns how many failed."""
    until = time.monotonic() + 60 * args.minutes
    decode(args)
    while args.after is not None and not args.after.exists() and time.monotonic() < until:
        time.sleep(0.2)
    todo = [
        (arm, seed) for seed in args.seeds for arm in args.arms if not record_path(arm, seed, args).exists()
    ]
    running: list[subprocess.Popen] = []
    failed = 0
    own = [sys.executable, "-W", "ignore", __file__, str(args.data), "--out", str(args.out)]
    own += ["--epochs", str(args.epochs)]
    while (todo or running) and time.monotonic() < until:
        while todo and len(running) < args.parallel:
            arm, seed = todo.pop(0)
            command = [*own, "--one", arm, str(seed), *args.overrides]
            log = record_path(arm, seed, args).with_suffix(".txt")
            log.parent.mkdir(parents=True, exist_ok=True)
            running.append(subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT))
        for process in [process for process in running if process.poll() is not None]:
            running.remove(process)
            if process.returncode:
                failed += 1
                print(f"failed: {shlex.join(process.args)}", file=sys.stderr)
        time.sleep(0.2)
    for process in running:
        process.kill()
    return failed


def summary(args: argparse.Namespace) -> str:
    """Means and sample standard deviations over seeds, and where there is one seed its values alone."""
    records = [json.loads(path.read_text()) for path in sorted((args.out / "records").glob("*.json"))]
    records = [record for record in records if record["epochs"] == args.epochs]
    write("comparison", {"records": records, "overrides": args.overrides}, args.out)
    metrics = list(dict.fromkeys(key for record in records for key in record))[3:]
    rows = []
    for arm in ARMS:
        own = [record for record in records if record["arm"] == arm]
        if own:
            rows.append([arm, str(len(own)), *(" ".join(_cell(own, metric)) for metric in metrics)])
    return table(["arm", "seeds", *metrics], rows)


def _cell(records: list[dict], metric: str) -> Iterator[str]:
    values = [record[metric] for record in records if metric in record]
    if values:
        yield f"{statistics.mean(values):.2f}"
    if len(values) > 1:
        yield f"± {statistics.stdev(values):.2f}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("data", type=Path, help="folder with train/ and test/")
    add("--out", type=Path, required=True, help="folder for runs, records and comparison.json")
    add("--epochs", type=int, default=10, help="of every run")
    add("--seeds", type=int, nargs="+", default=[5], help="one after the other")
    add("--arms", nargs="+", default=list(ARMS), choices=list(ARMS), help="all by default")
    add("--parallel", type=int, default=5, help="runs at a time")
    add("--minutes", type=float, default=9, help="after which what is unfinished is stopped")
    add("--after", type=Path, help="begin once this file is there; images are decoded before")
    add("--one", nargs=2, metavar=("ARM", "SEED"), help="a single run, in this process")
    args, args.overrides = parser.parse_known_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.one is None:
        failed = run_all(args)
        print(summary(args))
        return int(failed > 0)
    arm, seed = args.one[0], int(args.one[1])
    write_whole(record_path(arm, seed, args), json.dumps(run(arm, seed, args)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
