"""How many images a second each input pipeline turns into two views.

    python benchmarks/input_pipelines.py [--cases cifar jpeg] [--rounds 5] [--seconds 3] [--out FOLDER]

- ``cifar``: 32-pixel images in memory, the views of ``scripts/pretrain/cifar/augmentations/symmetric.yaml``.
- ``jpeg``: a folder of 256-pixel JPEGs, the views of ``.../imagenet/augmentations/symmetric.yaml``. They are
  squares cut from scikit-learn's two photographs, and the system keeps them in its cache: what is measured
  is decoding and views, not a disk. kornia decodes them once, before.

Each pipeline is the data module's own: loader, transfer to the device that is named, views. Every round runs
all of them in turn; workers are started before the clock is, and stopped before the next one's turn. The
ratio is to torchvision, image by image, on the same number of cores: the median over rounds of the quotient
within a round. Where others compute too, set OMP_WAIT_POLICY=passive: threads that spin while they wait for
one another take the cores that the others need, and all but stand still.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import Rounds, Spread, bar_chart, hardware_line, picture, synchronise, table, write
from omegaconf import OmegaConf
from PIL import Image
from sklearn.datasets import load_sample_images

from metamask_plugin import SCRIPTS
from metamask_plugin.data import Dataset, FileImages, ImageSplit, MemoryImages, PretrainDataModule
from metamask_plugin.data.registry import IMAGENET_MEAN_STD

CASES = {"cifar": "32 px in memory", "jpeg": "256 px JPEGs"}
TARGET = 2.0
"""Of kornia on the CPU, on CIFAR's views."""


@dataclass(frozen=True)
class Candidate:
    """One way to make the views.

    Attributes:
        settings: of ``data``, and ``dali.device``.
        cores: of the CPU that work at the views: threads of this process, or workers.
        device: where the views are when they are ready.
    """

    settings: dict[str, Any]
    cores: int
    device: str = "cpu"

    @property
    def workers(self) -> int:
        """That torchvision starts; a single core works in this process."""
        return self.cores if self.settings["data.pipeline"] == "torchvision" and self.cores > 1 else 0


def candidates(case: str, cores: int) -> dict[str, Candidate]:
    """What this machine can run; torchvision first."""
    torchvision, kornia = ({"data.pipeline": name} for name in ("torchvision", "kornia"))
    here = "cuda" if torch.cuda.is_available() else "cpu"
    counts = [1, cores] if cores > 1 else [1]
    on_host = {"data.on_device": False}
    found = {f"torchvision, {_cores(n)}": Candidate(torchvision, n, here) for n in reversed(counts)}
    found |= {f"kornia, {_cores(n)}": Candidate({**kornia, **on_host}, n) for n in reversed(counts)}
    if here == "cuda":
        gpu = {"kornia on the GPU": True, "kornia on the GPU, images on the host": False}
        found |= {
            name: Candidate({**kornia, "data.on_device": resident}, cores, "cuda")
            for name, resident in gpu.items()
        }
    if case == "jpeg" and find_spec("nvidia.dali"):
        dali = {"data.pipeline": None, "data.format": "dali"}
        found[f"DALI, {_cores(cores)}"] = Candidate({**dali, "dali.device": "cpu"}, cores, here)
        if here == "cuda":
            found["DALI on the GPU"] = Candidate({**dali, "dali.device": "gpu"}, cores, "cuda")
    return found


def _cores(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def cifar_like(count: int) -> ImageSplit:
    """Squares of the photographs at 32 pixels, in memory, over and over until they are ``count``."""
    squares = [np.asarray(square) for square in _squares(min(count, 2048), 32)]
    pixels = torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous()
    return MemoryImages(pixels, [0] * len(pixels), ["any"]).subset(torch.arange(count) % len(pixels))


def jpegs(folder: Path, files: int, count: int) -> ImageSplit:
    """So many image files, over and over until they are ``count``."""
    for number, square in enumerate(_squares(files, 256)):
        square.save(folder / f"{number}.jpg", quality=90)
    paths = [str(folder / f"{number % files}.jpg") for number in range(count)]
    return FileImages(paths, [0] * count, ["any"])


def _squares(count: int, size: int) -> Iterator[Image.Image]:
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        photograph = photographs[number % 2]
        side = int(torch.randint(64, min(photograph.size) + 1, (), generator=generator))
        left, top = (
            int(torch.randint(extent - side + 1, (), generator=generator)) for extent in photograph.size
        )
        square = photograph.crop((left, top, left + side, top + side))
        yield square.resize((size, size), Image.Resampling.BICUBIC)


@dataclass
class Pipeline:
    """A candidate's batches, as the training loop would get them."""

    name: str
    candidate: Candidate
    split: ImageSplit
    views: Path
    batch: int
    epoch: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        cfg = OmegaConf.create(
            {
                "data": {"dataset": "benchmark", "num_workers": self.candidate.workers},
                "augmentations": OmegaConf.load(self.views),
                "optimizer": {"batch_size": self.batch},
                "seed": 0,
            }
        )
        for key, value in self.candidate.settings.items():
            OmegaConf.update(cfg, key, value, force_add=True)
        if self.candidate.settings.get("data.format") == "dali":
            cfg.data.num_workers = self.candidate.cores
        dataset = Dataset("benchmark", self.split, None, 1, *IMAGENET_MEAN_STD)
        self.module = PretrainDataModule(dataset, cfg)

    def batches(self) -> Iterator[list]:
        """Without end; another epoch each time this is called."""
        device = torch.device(self.candidate.device)
        while True:
            loader = self.module.train_dataloader()
            loader.sampler.set_epoch(self.epoch)
            self.epoch += 1
            for batch in loader:
                moved = self.module.transfer_batch_to_device(batch, device, 0)
                yield self.module.on_after_batch_transfer(moved, 0)

    def seconds(self, batches: int) -> float:
        """Of one batch, the mean of so many, in the steady state: workers run, and nothing is in store."""
        with threads(1 if self.candidate.workers else self.candidate.cores):
            made = self.batches()
            for _ in islice(made, max(1, self.candidate.workers)):
                pass
            synchronise()
            start = time.perf_counter()
            for _ in islice(made, batches):
                pass
            synchronise()
            return (time.perf_counter() - start) / batches


@contextmanager
def threads(count: int) -> Iterator[None]:
    """So many of torch's, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure(case: str, args: argparse.Namespace, until: float | None) -> tuple[Rounds, int]:
    """Seconds an image of each candidate, round by round; and images in a batch.

    No round but the first begins after ``until``, a time of :func:`time.monotonic`.
    """
    folder = SCRIPTS / "pretrain" / {"cifar": "cifar", "jpeg": "imagenet"}[case]
    batch = args.batch or {"cifar": 256, "jpeg": 32}[case]
    images = max(args.images, 4 * batch)
    with tempfile.TemporaryDirectory() as scratch:
        split = cifar_like(images) if case == "cifar" else jpegs(Path(scratch), min(images, 64), images)
        pipelines, counts, failed = {}, {}, {}
        for name, candidate in candidates(case, args.cores).items():
            try:
                source = _decoded(split) if candidate.settings["data.pipeline"] == "kornia" else split
                views = folder / "augmentations" / "symmetric.yaml"
                pipelines[name] = Pipeline(name, candidate, source, views, batch)
                once = pipelines[name].seconds(1)
            except (
                RuntimeError,
                OSError,
            ) as error:  # a library without its driver: the others can be measured
                pipelines.pop(name, None)
                failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                print(f"left out: {name}: {failed[name]}")
                continue
            # a share of the time for each worker's turn, so that no one's lucky moment decides
            counts[name] = max(2 * candidate.workers, round(args.seconds / once), 1)
        seconds: dict[str, list[float]] = {name: [] for name in pipelines}
        for number in range(1, args.rounds + 1):
            if number > 1 and until is not None and time.monotonic() > until:
                break
            for name, pipeline in pipelines.items():
                seconds[name].append(pipeline.seconds(counts[name]) / batch)
            rates = ", ".join(f"{1 / values[-1]:.0f}" for values in seconds.values())
            print(f"round {number}/{args.rounds}: {rates} images/s", flush=True)
    return Rounds(next(iter(seconds)), seconds, failed), batch


def _decoded(split: ImageSplit) -> ImageSplit:
    """What the data module makes of files for kornia; here once, each file once, and 300 MB of them."""
    if isinstance(split, MemoryImages):
        return split
    files = len(set(split.paths))
    memory = split.subset(range(files)).to_memory(224)
    return memory.subset(torch.arange(min(len(split), 2048)) % files)


def reference(name: str, cores: int, names: list[str]) -> str:
    """torchvision on as many cores of the CPU; on all of them for what a GPU makes."""
    count = 1 if name.endswith("1 core") else cores
    same = f"torchvision, {_cores(count)}"
    return same if same in names else names[0]


def main(argv: list[str] | None = None) -> dict[str, Any]:
    args = parse(argv)
    if args.cores == 0:
        args.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    record: dict[str, Any] = {
        "settings": {key: value for key, value in vars(args).items() if key != "out"}
        | {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY")},
        "cases": {},
    }
    panels, ticks = {}, {}
    start = time.monotonic()
    for number, case in enumerate(args.cases, 1):
        until = args.minutes and start + 60 * args.minutes * number / len(args.cases)
        print(f"\n{CASES[case]}, two views of each, {args.cores} cores, {hardware_line()}")
        rounds, batch = measure(case, args, until)
        names = list(rounds.seconds)
        ratios = {name: rounds.ratio(reference(name, args.cores, names), name) for name in names}
        rates = {name: Spread.of(1 / value for value in values) for name, values in rounds.seconds.items()}
        rows = [
            [name, *(f"{value:.0f}" for value in rate), ratios[name], reference(name, args.cores, names)]
            for name, rate in rates.items()
        ]
        print("\n" + table(["images/s", "median", "low", "high", "ratio", "to"], rows))
        record["cases"][case] = {
            "batch": batch,
            "images_per_second": {name: rate._asdict() for name, rate in rates.items()},
            "ratio_on_the_same_cores": {name: ratio._asdict() for name, ratio in ratios.items()},
            "reference": {name: reference(name, args.cores, names) for name in names},
            "seconds_per_image": rounds.seconds,
            "failed": rounds.failed,
        }
        title = f"{CASES[case]}, batch {batch}"
        panels[title] = ratios
        if case == "cifar":
            ticks[title] = {name: TARGET for name in names if name.startswith("kornia") and "core" in name}
    if args.out is not None:
        write("input_pipelines", record, args.out)
        label = "images/s, in those of torchvision on the same cores"
        figure = bar_chart(panels, label, f"Input pipelines, {hardware_line()}", ticks, reference=1.0)
        picture("input_pipelines", figure, args.out)
    return record


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--cases", nargs="+", default=list(CASES), choices=CASES, help="what to measure")
    add("--rounds", type=int, default=5, help="rounds, in each of which every pipeline has its turn")
    add("--seconds", type=float, default=3, help="about so long a turn")
    add("--cores", type=int, default=0, help="of the CPU, for threads and workers; 0: all there are")
    add("--batch", type=int, help="images in a batch (256 of 32 pixels, 32 of 256)")
    add("--images", type=int, default=50_000, help="images in an epoch")
    add("--minutes", type=float, help="begin no further round after so long")
    add("--out", type=Path, help="folder for input_pipelines.json and input_pipelines.png")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
