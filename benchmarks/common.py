"""What the benchmarks share: timings in paired rounds, the hardware's name, JSON, pictures.

A machine that does other things meanwhile slows everything down alike, so no benchmark compares seconds of
two moments: every round times all candidates in turn, the unit first, and a ratio is the median over rounds
of the quotient within a round.
"""

import json
import platform
import statistics
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.evaluation.figures import BLUE, GREY, ORANGE, save
from metamask_plugin.methods import METHODS


class Spread(NamedTuple):
    """Median, smallest and largest of a quantity over rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        values = list(values)
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} - {self.high:.2f})"


@dataclass
class Rounds:
    """Paired timings.

    Attributes:
        unit: the candidate that ratios are relative to.
        seconds: of one call, by candidate, one entry a round; a candidate that failed has none.
        failed: what a candidate that could not run said, in one line.
    """

    unit: str
    seconds: dict[str, list[float]]
    failed: dict[str, str] = field(default_factory=dict)

    def ratio(self, name: str, unit: str | None = None) -> Spread:
        """Quotient to ``unit`` within a round, over the rounds."""
        return Spread.of(ours / one for ours, one in zip(self.seconds[name], self.seconds[unit or self.unit]))

    def ratios(self) -> dict[str, Spread]:
        """Of every candidate that ran, the unit (which is 1) included."""
        return {name: self.ratio(name) for name in self.seconds}

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "unit": self.unit,
            "seconds": self.seconds,
            "ratio": {name: ratio._asdict() for name, ratio in self.ratios().items()},
            "failed": self.failed,
        }


def seconds(call: Callable[[], Any], repeats: int = 1, processor: bool = False) -> float:
    """Time of one call, the mean of ``repeats``; whatever runs on a GPU is waited for.

    Args:
        call: is timed.
        repeats: how often.
        processor: count this process's processor time, which stands still while other work has the core, in
            place of wall time. For one thread on a machine that others use, and no GPU.
    """
    clock = time.process_time if processor else time.perf_counter
    synchronise()
    start = clock()
    for _ in range(repeats):
        call()
    synchronise()
    return (clock() - start) / repeats


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def paired_rounds(
    candidates: Mapping[str, Callable[[], Any]],
    rounds: int,
    repeats: int = 1,
    warmup: int = 1,
    steps: Mapping[str, int] | None = None,
    until: float | None = None,
    processor: bool = False,
    report: Callable[[str], Any] | None = print,
) -> Rounds:
    """Times all candidates in turn, round after round; the first candidate is the unit.

    Args:
        candidates: by name, the unit first.
        rounds: that count, at least 1.
        repeats: calls in one timing; for steps so short that the clock or the launch would be seen.
        warmup: rounds before, which do not count: allocation, compilation, choice of kernels. A candidate
            that raises in one of them is left out and named in ``failed``; the unit must not.
        steps: how many steps one call of a candidate makes, where more than one; its time is divided by it.
        until: a time of :func:`time.monotonic` after which no further round starts, once one was made.
        processor: see :func:`seconds`.
        report: is given a line a round; None for silence.
    """
    unit = next(iter(candidates))
    failed: dict[str, str] = {}
    for name, call in candidates.items():
        try:
            if name != unit and until is not None and time.monotonic() > until:
                raise TimeoutError("no time was left")
            for _ in range(warmup):
                call()
        except (
            Exception
        ) as error:  # out of memory, a compiler that gives up: the others can still be measured
            if name == unit:
                raise
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            _tell(report, f"left out: {name}: {failed[name]}")
    timings: dict[str, list[float]] = {name: [] for name in candidates if name not in failed}
    for number in range(1, rounds + 1):
        if number > 1 and until is not None and time.monotonic() > until:
            break
        for name, values in timings.items():
            values.append(seconds(candidates[name], repeats, processor) / (steps or {}).get(name, 1))
        _tell(report, f"round {number}/{rounds}: {unit} {timings[unit][-1]:.3g} s")
    return Rounds(unit, timings, failed)


def _tell(report: Callable[[str], Any] | None, line: str) -> None:
    if report is not None:
        report(line)


def device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def hardware() -> dict[str, Any]:
    """What the numbers were measured on; nothing that names the machine or its user."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {platform.machine()}",
        "devices": torch.cuda.device_count() if torch.cuda.is_available() else 1,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.version.cuda
    return found


def hardware_line() -> str:
    """The same, in half a line."""
    found = hardware()
    count = found["threads"]
    threads = "" if torch.cuda.is_available() else f", {count} thread{'s' * (count > 1)}"
    return f"{found['device']}{threads}, torch {found['torch']}"


def write(name: str, record: Mapping[str, Any], out: str | Path) -> Path:
    """Writes ``<out>/<name>.json``: the record, and the hardware beside it."""
    path = Path(out) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"hardware": hardware(), **record}, indent=2, default=str) + "\n")
    return path


def bar_chart(
    panels: Mapping[str, Mapping[str, Spread | float]],
    label: str,
    title: str | None = None,
    targets: Mapping[str, Mapping[str, float]] | None = None,
    reference: float | None = None,
    form: str = "{:.2f}",
) -> Figure:
    """Horizontal bars with their range over the rounds, one panel a group.

    Args:
        panels: by panel title, the quantities by name; drawn from the top in this order.
        label: of the quantity, below every panel.
        title: over all.
        targets: by panel and name, what is to be reached: drawn as a tick across the bar.
        reference: a dashed line in every panel (1 for ratios); None for none.
        form: how a median is printed behind its bar.
    """
    rows = max(len(bars) for bars in panels.values())
    figure = Figure(figsize=(5.6 * len(panels), 1.1 + 0.32 * rows), layout="constrained")
    for axes, (name, bars) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items()):
        spreads = [
            value if isinstance(value, Spread) else Spread(value, value, value) for value in bars.values()
        ]
        medians = [spread.median for spread in spreads]
        errors = [[s.median - s.low for s in spreads], [s.high - s.median for s in spreads]]
        places = range(len(spreads))
        axes.barh(places, medians, xerr=errors, color=BLUE, height=0.62, error_kw={"ecolor": GREY, "lw": 1.2})
        for place, spread in zip(places, spreads):
            # on white, as the line of reference may pass behind it
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
            style = {"textcoords": "offset points", "va": "center", "fontsize": 8, "bbox": box}
            axes.annotate(form.format(spread.median), (spread.high, place), (4, 0), **style)
        wanted = (targets or {}).get(name, {})
        marks = [(wanted[key], place) for place, key in zip(places, bars) if key in wanted]
        for index, (value, place) in enumerate(marks):
            legend = "target" if index == 0 else None
            axes.plot([value] * 2, [place - 0.4, place + 0.4], color=ORANGE, lw=2.2, label=legend)
        if reference is not None:
            axes.axvline(reference, color=GREY, linestyle="--", linewidth=0.9)
        axes.set_yticks(list(places), labels=list(bars), fontsize=8)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(label)
        axes.margins(x=0.14)
        axes.set_xlim(left=0)
        axes.grid(axis="x", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if marks:
            axes.legend(frameon=False, fontsize=8, loc="best")
    if title:
        figure.suptitle(textwrap.fill(title, 64 * len(panels)), fontsize=10)
    return figure


def picture(name: str, figure: Figure, out: str | Path) -> Path:
    """Writes ``<out>/<name>.png``."""
    path = Path(out) / f"{name}.png"
    save(figure, path)
    return path


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Columns of text, the first to the left and the others to the right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in ruled
    )


def model_config(backbone: str, size: int, method: str = "metamask", **overrides: Any) -> DictConfig:
    """A complete config with the paper's heads, SGD with momentum, and nothing of data.

    Args:
        backbone: the encoder's name.
        size: side of the images, pixels.
        method: ``metamask`` or ``baseline``.
        overrides: dotted keys with ``__`` for the dot: ``method_kwargs__meta__every_n_steps=4``.
    """
    cfg = OmegaConf.create(
        {
            "method": method,
            "backbone": {"name": backbone},
            "data": {"dataset": "cifar10", "num_classes": 10, "num_large_crops": 2, "num_small_crops": 0},
            "augmentations": [{"crop_size": size, "num_crops": 2}],
            "max_epochs": 1,
            "optimizer": {
                "name": "sgd",
                "batch_size": 1,
                "lr": 1e-3,
                "classifier_lr": 0.1,
                "weight_decay": 5e-4,
                "kwargs": {"momentum": 0.9},
            },
            "scheduler": {"name": "none"},
            "method_kwargs": {},
        }
    )
    for key, value in overrides.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, merge=False, force_add=True)
    return cfg


def build_model(backbone: str, size: int, method: str = "metamask", **overrides: Any):
    """The method of :func:`model_config`, with a mask off its starting point where it has one."""
    model = METHODS[method](model_config(backbone, size, method, **overrides))
    for parameter in getattr(model, "mask", torch.nn.Module()).parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.to(device())


def noise_views(batch: int, size: int, count: int = 2) -> list[torch.Tensor]:
    """Views of standard normal noise, (batch, 3, size, size) each, on :func:`device`."""
    return [torch.randn(batch, 3, size, size, device=device()) for _ in range(count)]
