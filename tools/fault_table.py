"""The table of docs/reliability.md from JUnit files of the tests marked ``fault`` and ``load``.

    python -m pytest -m "fault or load" --junitxml faults.xml
    python tools/fault_table.py faults.xml [more.xml ...]

A test, or each of its cases, injects one fault; it is survived where the test passes, lost where it does not.
Of a test that stands in several files the last one counts. A fault known from a public report names it:
``@pytest.mark.fault("data", source="pytorch/vision#2831")``.
"""

import sys
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

COUNTED = ("inputs", "tracebacks")
"""What tests that try many inputs count by themselves."""


def tests_of(junit: Path) -> dict[tuple[str, str], tuple[dict[str, str], str]]:
    """Of each test that was marked what it recorded, and ``passed``, ``failed`` or ``skipped``."""
    found = {}
    for case in ElementTree.parse(junit).iter("testcase"):
        recorded = {entry.get("name"): entry.get("value") for entry in case.iter("property")}
        bad = case.find("failure") is not None or case.find("error") is not None
        skipped = case.find("skipped") is not None
        if {"fault", "load"} & recorded.keys():
            state = "failed" if bad else "skipped" if skipped else "passed"
            found[case.get("classname"), case.get("name")] = recorded, state
    return found


def table(tests: list[tuple[dict[str, str], str]]) -> str:
    """Faults by area, inputs tried, public reports tried, and loads held; as Markdown."""
    counts, inputs = Counter(), Counter()
    for recorded, state in tests:
        area = recorded.get("fault")
        if area is not None:
            counts[area, state] += 1
            for name in COUNTED:
                inputs[area, name] += int(recorded.get(name, 0))
    areas = list(dict.fromkeys(area for area, _ in counts))
    lines = [
        "| area | faults injected | survived | lost | not injected here | inputs tried | tracebacks |",
        "|---|---|---|---|---|---|---|",
    ]
    for area in [*areas, "all"]:
        chosen = areas if area == "all" else [area]
        passed, failed, skipped = (
            sum(counts[name, state] for name in chosen) for state in ("passed", "failed", "skipped")
        )
        tried, shown = (sum(inputs[name, kind] for name in chosen) for kind in COUNTED)
        lines.append(
            f"| {area} | {passed + failed} | {passed} | {failed} | {skipped} | {tried:,} | {shown} |"
        )
    reports: dict[tuple[str, str], Counter[str]] = {}
    for recorded, state in tests:
        if "source" in recorded:
            reports.setdefault((recorded["fault"], recorded["source"]), Counter())[state] += 1
    lines += ["", "| area | public reports | tried | survived |", "|---|---|---|---|"]
    for (area, source), states in sorted(reports.items()):
        tried = states["passed"] + states["failed"]
        lines.append(f"| {area} | {source} | {tried} | {states['passed']} |")
    loads = {recorded["load"]: state for recorded, state in tests if "load" in recorded}
    lines += ["", "| load | outcome |", "|---|---|"]
    lines += [f"| {what} | {state} |" for what, state in loads.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        raise SystemExit("error: a JUnit file must be given: python -m pytest --junitxml FILE")
    by_name = {}
    for path in sys.argv[1:]:
        by_name |= tests_of(Path(path))
    marked = list(by_name.values())
    print(table(marked))
    raise SystemExit(any(state == "failed" for _, state in marked))
