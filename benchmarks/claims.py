"""The project's targets, read off the benchmarks' JSON files."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from iterations import RELEASE
from peers import UNIT


class Claim(NamedTuple):
    """A row of the table."""

    what: str
    wanted: str
    measured: str
    met: str


def claims(out: Path) -> list[Claim]:
    """All targets of which something was measured, from ``<out>/<benchmark>/*.json``."""
    return [
        *_steps(out),
        *_epochs(out),
        *_memory(_read(out / "peak_memory" / "peak_memory.json")),
        *_pipelines(_read(out / "input_pipelines" / "input_pipelines.json")),
    ]


def _read(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text()) if path.exists() else None


def _claim(what: str, wanted: float, found: float, form: str = "{:.2f}", at_least: bool = False) -> Claim:
    met = found >= wanted if at_least else found <= wanted
    sign = "at least" if at_least else "at most"
    return Claim(what, f"{sign} {wanted:g}", form.format(found), "yes" if met else "no")


def _steps(out: Path) -> Iterator[Claim]:
    for path in sorted(out.glob("step_cost*/step_cost.json")):
        record = _read(path)
        cuda = "CPU" not in record["hardware"]["device"]
        compiled = bool(record["settings"]["compile"])
        for cell in record["cells"]:
            setting = f"{cell['backbone']}, batch {cell['batch']}, {cell['precision']}"
            setting += ", compiled" if compiled else ""
            setting += ", meta step as a CUDA graph" if record["settings"].get("cuda_graph") else ""
            meta = cell.get("meta", {}).get("ratio", {})
            if "exact" in meta and not cuda:
                what = f"exact meta step alone, in SimCLR + Barlow steps ({setting})"
                yield _claim(what, 3.2, meta["exact"]["median"])
            yield from _iterations(cell.get("full", {}), setting, cuda)


def _iterations(full: dict[str, Any], setting: str, cuda: bool) -> Iterator[Claim]:
    ratios, wanted = full.get("ratio", {}), {1: 3.4, 4: 1.7, 8: 1.35} if cuda else {4: 1.9}
    for k, limit in wanted.items():
        for name in (f"exact, k = {k}", f"exact, shared forward, k = {k}"):
            if name in ratios:
                what = f"MetaMask iteration, {name}, in SimCLR + Barlow iterations ({setting})"
                yield _claim(what, limit, ratios[name]["median"])
    release = full.get("seconds", {}).get(RELEASE)
    if release and cuda:
        for name in ("exact, k = 1", "exact, shared forward, k = 1"):
            if ours := full["seconds"].get(name):
                quotients = sorted(theirs / own for theirs, own in zip(release, ours))
                what = f"iteration of the release in float32, in MetaMask's, {name} ({setting})"
                yield _claim(what, 3.0, quotients[len(quotients) // 2], at_least=True)


def _epochs(out: Path) -> Iterator[Claim]:
    for path in sorted(out.glob("epoch_time*/epoch_time.json")):
        record = _read(path)
        if "CPU" in record["hardware"]["device"]:
            continue
        settings = record["settings"]
        for name, row in record["epochs"].items():
            what = f"hours of 800 epochs, {name} ({settings['backbone']}, batch {settings['batch']}, "
            what += settings["precision"] + (", compiled" if row["compiled"] else "")
            if (share := row.get("share_of_matrix_peak")) is not None:
                what += f"; {share:.0%} of the matrix peak"
            if (waiting := row.get("data_wait_share")) is not None:
                what += f"; {waiting:.1%} waiting for data"
            claim = _claim(what + ")", 1.0, row["hours_of_800_epochs"])
            yield claim if name != UNIT else claim._replace(wanted="-", met="-")


def _memory(record: dict[str, Any] | None) -> Iterator[Claim]:
    for cell in record["cells"] if record else []:
        setting = f"{cell['backbone']}, batch {cell['batch']}, {cell['precision']}"
        for part, title in (("meta", "exact meta step"), ("full", "MetaMask iteration")):
            if "exact" in cell[part]:
                what = f"peak memory of the {title}, in the SimCLR + Barlow step's ({setting})"
                yield _claim(what, 2.0, cell[part]["exact"]["ratio"])


def _pipelines(record: dict[str, Any] | None) -> Iterator[Claim]:
    cifar = record["cases"].get("cifar", {}) if record else {}
    for name, ratio in cifar.get("ratio_on_the_same_cores", {}).items():
        if name.startswith("kornia"):
            what = f"images/s of {name}, in torchvision's per image on as many cores (CIFAR's views)"
            yield _claim(what, 2.0, ratio["median"], at_least=True)
