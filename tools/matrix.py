"""Runs the tests on every supported Python, with the lowest and the newest supported dependencies.

    python tools/matrix.py                                   # all of it: hours, and 7 GB an environment
    python tools/matrix.py --quick --pythons 3.13 --sets newest

``lowest`` takes the lower bounds of setup.cfg, or the first versions above them that have wheels for the
interpreter; ``newest`` what pip would take. Environments are made by uv below ``--folder`` and removed
afterwards. A table of what was run, and of what could not be, is printed and written to ``matrix.txt`` there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).parent))
from audit import ROOT, requirements

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
SETS = ("lowest", "newest")
SHOWN = ("torch", "lightning", "timm", "kornia", "torchmetrics")
TESTS = ("pytest", "pytest-xdist", "einops", "umap-learn", "black", "hydra-joblib-launcher")
"""Of the extra ``test``: without DALI and wandb, whose tests skip where they are missing."""

COMPILED = (
    "numpy",
    "scipy",
    "scikit-learn",
    "matplotlib",
    "pillow",
    "safetensors",
    "kornia-rs",
    "pyyaml",
    "numba",
)
"""Never built from source: a version without a wheel for an interpreter is not supported there."""

QUICK = (
    "tests/bilevel",
    "tests/losses",
    "tests/modules",
    "tests/methods/test_metamask.py",
    "tests/methods/test_icl_msr.py",
    "tests/evaluation/test_linear.py",
    "tests/evaluation/test_checkpoints.py",
    "tests/data/test_views.py",
    "tests/cli/test_pretrain.py",
)


class Failed(Exception):
    """An environment that cannot be made; the message says why in one line."""


def made(python: str, which: str, folder: Path) -> Path:
    """Makes an environment and returns its interpreter.

    Args:
        python: e.g. ``3.12``.
        which: one of :data:`SETS`.
        folder: of the environment.

    Raises:
        Failed: there is no such interpreter, or no set of versions with wheels for it.
    """
    _uv("venv", "--clear", "--seed", "--python", found(python), str(folder))
    interpreter = folder / "bin" / "python"
    wanted = requirements(extras=False)
    source, lock = folder / "wanted.txt", folder / "lock.txt"
    source.write_text("".join(f"{requirement}\n" for requirement in wanted))
    wheels = [word for name in COMPILED for word in ("--only-binary", name)]
    order = "lowest-direct" if which == "lowest" else "highest"
    into = ("--python", str(interpreter))
    _uv("pip", "compile", *into, *wheels, "--resolution", order, "--output-file", str(lock), str(source))
    # lightning before 2.4 imports pkg_resources, which setuptools 82 took out
    of_its_time = ["setuptools<82"] if which == "lowest" else []
    versions = {canonical.name: canonical for canonical in requirements()}
    tests = [str(versions[name]) for name in TESTS]
    _uv("pip", "install", *into, *wheels, "--requirement", str(lock), *tests, *of_its_time)
    _uv("pip", "install", *into, "--no-deps", "--editable", str(ROOT))
    return interpreter


def found(python: str) -> str:
    """An interpreter of this version, on the path or pyenv's; else the version, which uv may fetch."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{python}"), *sorted(root.glob(f"versions/{python}.*/bin/python"))]
    for candidate in filter(None, candidates):  # pyenv's shims stand on the path and may lead nowhere
        if subprocess.run([str(candidate), "--version"], capture_output=True).returncode == 0:
            return str(candidate)
    return python


def _uv(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "uv", "--quiet", *words], capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line.strip(" ×╰─▶│") for line in done.stderr.splitlines() if line.strip(" ×╰─▶│")]
        raise Failed(" ".join(line for line in lines if not line.startswith("warning"))[:200])


def versions_of(interpreter: Path) -> dict[str, str]:
    """Versions of :data:`SHOWN` and of Python itself."""
    code = (
        "import json, platform; from importlib.metadata import version\n"
        f"print(json.dumps({{'python': platform.python_version(), **{{n: version(n) for n in {SHOWN!r}}}}}))"
    )
    return json.loads(subprocess.check_output([str(interpreter), "-c", code], text=True))


def tested(interpreter: Path, paths: Sequence[str], folder: Path) -> dict[str, Any]:
    """Runs the tests; returns how many passed, failed and were skipped, and the seconds they took."""
    result = folder / "result.xml"
    words = ["-m", "not slow", "-q", "-n", "auto", "--maxprocesses", "4", "--dist", "loadfile"]
    command = [
        str(interpreter),
        "-m",
        "pytest",
        *words,
        "-p",
        "no:cacheprovider",
        f"--junitxml={result}",
        *paths,
    ]
    environment = {
        key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    # tests start Python by its name, too
    environment["PATH"] = os.pathsep.join([str(interpreter.parent), environment["PATH"]])
    started = time.monotonic()
    with (folder / "tests.log").open("w") as log:
        subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
    seconds = round(time.monotonic() - started)
    if not result.exists():
        raise Failed(f"pytest did not end, see {folder / 'tests.log'}")
    suite = ElementTree.parse(result).getroot().find("testsuite").attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in ElementTree.parse(result).iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    passed = int(suite["tests"]) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": seconds, "failures": names}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each cell of the matrix, and below it what failed."""
    columns = ("python", "set", *SHOWN, "passed", "failed", "skipped", "seconds")
    lines = [columns] + [[str(row.get(column, "-")) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    text = ["  ".join(word.ljust(width) for word, width in zip(line, widths)).rstrip() for line in lines]
    for row, line in zip(rows, range(1, len(lines))):
        if "reason" in row:
            text[line] = (
                f"{row['python'].ljust(widths[0])}  {row['set'].ljust(widths[1])}  NOT RUN: {row['reason']}"
            )
    failures = [f"{row['python']} {row['set']}: {name}" for row in rows for name in row.get("failures", ())]
    return "\n".join([*text, *failures]) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the matrix; 1 where a test failed or a cell could not be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pythons", nargs="+", default=PYTHONS, help="versions")
    add("--sets", nargs="+", default=SETS, choices=SETS)
    add("--quick", action="store_true", help="a part of the tests that uses every dependency")
    add("--tests", nargs="+", default=[], help="these tests alone")
    add("--folder", type=Path, default=ROOT / ".matrix")
    add("--keep", action="store_true", help="leave the environments there")
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for python in args.pythons:
        for which in args.sets:
            folder = args.folder / f"{python}-{which}"
            try:
                interpreter = made(python, which, folder)
                row = {**versions_of(interpreter), "set": which}
                rows.append(
                    {**row, **tested(interpreter, args.tests or (QUICK if args.quick else ()), folder)}
                )
            except Failed as error:
                rows.append({"python": python, "set": which, "reason": str(error)})
            args.folder.mkdir(parents=True, exist_ok=True)
            (args.folder / "matrix.txt").write_text(table(rows))  # also of a matrix that is interrupted
            if not args.keep:
                shutil.rmtree(folder, ignore_errors=True)
    print(table(rows), end="")
    return int(any(row.get("failed") or "reason" in row for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
