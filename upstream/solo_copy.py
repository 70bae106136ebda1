"""The copy of solo-learn: what is added to it, edited, and then says differently from the original."""

import shutil
import subprocess
import sys
from difflib import unified_diff
from pathlib import Path

from reflow import reflow
from refusal import Refusal

LINE_LENGTH = 100

NOT_COPIED = (
    *(".git", ".venv", "__pycache__", ".pytest_cache", "*.egg-info"),
    *("datasets", "trained_models", "lightning_logs"),
)
"""What a clone that is worked with holds besides solo-learn."""


class Copy:
    """The copy of solo-learn in the making, and what was done to it."""

    def __init__(self, solo: Path, folder: Path):
        self.solo, self.folder = solo, folder
        self.changed: list[str] = []
        shutil.copytree(solo, folder, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self.licence = self._licence("solo/methods/__init__.py")

    def _licence(self, path: str) -> str:
        lines = (self.folder / path).read_text().splitlines()
        code = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
        text = "\n".join(lines[:code]).rstrip()
        if "copyright" not in text.lower():
            raise Refusal(f"{path}: no licence in its first lines, which every new file is to start with")
        return text + "\n\n"

    def add(self, path: str, text: str) -> None:
        """A new file; Python files get solo-learn's licence."""
        target = self.folder / path
        if target.exists():
            raise Refusal(f"{path} is in solo-learn already; give ours another place in upstream/generate.py")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.licence + text if path.endswith(".py") else text)
        self.changed.append(path)

    def edit(self, path: str, before: str, after: str, reason: str) -> None:
        """Puts lines in the place of one line."""
        target = self.folder / path
        lines = target.read_text().splitlines(keepends=True) if target.exists() else []
        found = [number for number, line in enumerate(lines) if line.rstrip("\n") == before]
        if len(found) != 1:
            times = "no" if not found else f"{len(found)} times the"
            raise Refusal(f"{path}: {times} line {before.strip()!r}, {reason}; see upstream/generate.py")
        lines[found[0]] = after + "\n"
        target.write_text("".join(lines))
        if path not in self.changed:
            self.changed.append(path)

    def packages(self) -> None:
        """An ``__init__.py`` in every folder of tests, as solo-learn has them."""
        folders = {Path(path).parent for path in self.changed if path.startswith("tests/")}
        for folder in sorted(folders):
            if not (self.folder / folder / "__init__.py").exists():
                self.add(f"{folder}/__init__.py", "")

    def format(self) -> None:
        """black on the new files, and lines that it leaves too long: docstrings and comments."""
        paths = [path for path in self.changed if path.endswith(".py") and not (self.solo / path).exists()]
        files = [self.folder / path for path in paths]
        black(files)
        for file in files:
            file.write_text(reflow(file.read_text(), LINE_LENGTH))
        black(files)

    def check(self, traces: tuple[str, ...]) -> None:
        """Refuses a file that says any of ``traces``."""
        for path in self.changed:
            text = (self.folder / path).read_text()
            for trace in traces:
                if trace in text:
                    line = text[: text.index(trace)].count("\n") + 1
                    raise Refusal(f"{path}:{line} still says {trace}; add a rule to upstream/generate.py")

    def patch(self) -> str:
        """Unified diff of all that was added and edited, as ``git apply`` and ``patch -p1`` take it."""
        return "".join(self._diff(path) for path in sorted(self.changed))

    def _diff(self, path: str) -> str:
        old, new = self.solo / path, self.folder / path
        before = old.read_text().splitlines(keepends=True) if old.exists() else []
        after = new.read_text().splitlines(keepends=True)
        source = f"a/{path}" if old.exists() else "/dev/null"
        mode = "" if old.exists() else "new file mode 100644\n"
        body = "".join(
            line if line.endswith("\n") else line + "\n\\ No newline at end of file\n"
            for line in unified_diff(before, after, source, f"b/{path}")
        )
        return f"diff --git a/{path} b/{path}\n{mode}{body}"


def black(files: list[Path]) -> None:
    command = [sys.executable, "-m", "black", "-q", "-l", str(LINE_LENGTH), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refusal(f"black failed: {(done.stderr.strip() or 'it does not say why').splitlines()[-1]}")
