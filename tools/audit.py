"""Known vulnerabilities of the dependencies: as installed, and at the lower bounds that the project names.

    python tools/audit.py             # what cannot be checked is said, and is no failure
    python tools/audit.py --strict    # then it is a failure

Bounds are those of setup.cfg and pyproject.toml. Two sources: ``advisories.cfg`` beside this file, which
needs no network and says which advisories are accepted and why; and pip-audit, which asks PyPI. Exit code
1: a vulnerability that is not accepted, or a dependency without a lower bound. 3, with ``--strict``:
something could not be checked.
"""

import argparse
import configparser
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
OWN = ("pip", "metamask-plugin")
"""Not asked for: the project itself, and what installs it."""


@dataclass(frozen=True)
class Advisory:
    """A known vulnerability: its names, which versions of a package have it, and why it is accepted."""

    ids: tuple[str, ...]
    package: str
    affected: tuple[SpecifierSet, ...]
    what: str
    accepted: str | None

    def concerns(self, package: str, found: str) -> bool:
        """Whether this version of this package has it."""
        return package == self.package and any(
            part.contains(found, prereleases=True) for part in self.affected
        )


def advisories(path: Path = ROOT / "tools" / "advisories.cfg") -> list[Advisory]:
    """Reads the file."""
    config = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    config.optionxform = str
    config.read_string(path.read_text(encoding="utf-8"))
    return [
        Advisory(
            (name, *section.get("aliases", "").split()),
            canonicalize_name(section["package"]),
            tuple(SpecifierSet(line) for line in section["affected"].split("\n") if line),
            section["what"],
            section.get("accepted"),
        )
        for name, section in ((name, config[name]) for name in config.sections())
    ]


def requirements(root: Path = ROOT, extras: bool = True) -> list[Requirement]:
    """All that setup.cfg asks for, and with ``extras`` what these do and what builds the package."""
    config = configparser.ConfigParser(interpolation=None)
    config.read_string((root / "setup.cfg").read_text(encoding="utf-8"))
    lines = config["options"]["install_requires"].splitlines()
    for extra in config["options.extras_require"].values() if extras else ():
        lines += extra.splitlines()
    # Python 3.10 has no tomllib, and one line is all that is wanted
    built = re.search(r"^requires = (\[.*\])$", (root / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    lines += json.loads(built[1]) if built and extras else []
    lines = (line.split("#")[0].strip() for line in lines)
    return [Requirement(line) for line in lines if line]


def lower_bounds(wanted: list[Requirement]) -> tuple[dict[str, str], list[str]]:
    """The lowest version of each package, and the packages that have none."""
    bounds, without = {}, []
    for requirement in wanted:
        name = canonicalize_name(requirement.name)
        found = [part.version for part in requirement.specifier if part.operator in (">=", "==", "~=")]
        if found:
            bounds[name] = found[0]
        elif name not in without:
            without.append(name)
    return bounds, [name for name in without if name not in bounds]


def installed(wanted: list[Requirement]) -> dict[str, str]:
    """What is installed of the requirements, and of what these require in turn."""
    requires = {canonicalize_name(found.metadata["Name"]): found.requires or [] for found in distributions()}
    found, left = {}, [canonicalize_name(requirement.name) for requirement in wanted]
    while left:
        name = left.pop()
        if name in found or name in OWN or name not in requires:
            continue
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
        for line in requires[name]:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                left.append(canonicalize_name(requirement.name))
    return dict(sorted(found.items()))


def asked_of_pypi(versions: Mapping[str, str]) -> tuple[list[tuple[str, str, tuple[str, ...]]], list[str]]:
    """What pip-audit finds, as (package, version, ids), and the packages that it could not check."""
    public = {name: found for name, found in versions.items() if "+" not in found}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}=={found}\n" for name, found in public.items()))
        file.flush()
        words = [
            "--no-deps",
            "--disable-pip",
            "--progress-spinner=off",
            "--format=json",
            "--requirement",
            file.name,
        ]
        done = subprocess.run([sys.executable, "-m", "pip_audit", *words], capture_output=True, text=True)
    try:
        answers = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):  # no network, or no pip-audit
        return [], list(versions)
    found = [
        (canonicalize_name(answer["name"]), answer["version"], (entry["id"], *entry.get("aliases", ())))
        for answer in answers
        for entry in answer.get("vulns", ())
    ]
    checked = {canonicalize_name(answer["name"]) for answer in answers if "skip_reason" not in answer}
    return found, [name for name in versions if name not in checked]


def audit(
    title: str, versions: Mapping[str, str], known: list[Advisory], online: bool
) -> tuple[bool, list[str]]:
    """Prints what is known of these versions; returns if all is well, and what pip-audit did not check."""
    print(f"\n{title}: {len(versions)} packages")
    lines, well = [], True
    for entry in known:
        for name in (name for name, found in versions.items() if entry.concerns(name, found)):
            fine = entry.accepted is not None
            well &= fine
            verdict = f"accepted: {entry.accepted}" if fine else "VULNERABLE"
            lines.append(f"  {name} {versions[name]}  {entry.ids[0]}  {entry.what}; {verdict}")
    found, unchecked = asked_of_pypi(versions) if online else ([], list(versions))
    accepted = {identifier for entry in known if entry.accepted for identifier in entry.ids}
    reported = {identifier for entry in known for identifier in entry.ids}
    for name, number, ids in found:
        if not reported & set(ids):
            well = False
            lines.append(f"  {name} {number}  {' '.join(ids)}  pip-audit; VULNERABLE")
        elif not accepted & set(ids):
            well = False
    print("\n".join(lines or ["  nothing known"]))
    if unchecked:
        which = "all of them" if len(unchecked) == len(versions) else ", ".join(unchecked)
        print(f"  NOT CHECKED by pip-audit, as PyPI did not answer for {which}")
    return well, unchecked


def exit_codes(argv: list[str] | None = None) -> Iterator[int]:
    """Audits both sets; yields exit codes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--strict", action="store_true", help="fail where something could not be checked")
    parser.add_argument("--offline", action="store_true", help="advisories.cfg alone")
    args = parser.parse_args(argv)
    wanted, known = requirements(), advisories()
    bounds, without = lower_bounds(wanted)
    for title, versions in (("lower bounds", bounds), ("installed", installed(wanted))):
        well, unchecked = audit(title, versions, known, not args.offline)
        yield 0 if well else 1
        yield 3 if unchecked and args.strict else 0
    if without:
        print(f"\nwithout a lower bound in setup.cfg: {', '.join(without)}")
        yield 1


def main(argv: list[str] | None = None) -> int:
    """Audits; 1 comes before 3."""
    codes = list(exit_codes(argv))
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    raise SystemExit(main())
