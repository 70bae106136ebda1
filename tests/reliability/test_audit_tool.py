"""The audit of dependencies: what it must find is put before it, and what it cannot check it says."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging")
ROOT = Path(__file__).resolve().parents[2]
AUDIT = ROOT / "tools" / "audit.py"


@pytest.fixture(scope="module")
def audit():
    spec = importlib.util.spec_from_file_location("audit_of_dependencies", AUDIT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.fault("security")
@pytest.mark.parametrize(
    ("package", "found"),
    [
        ("torch", "2.5.1"),
        ("torch", "2.9.1"),
        ("hydra-core", "1.3.2"),
        ("pillow", "12.2.0"),
        ("jinja2", "3.1.5"),
        ("lightning", "2.6.2"),
        ("scikit-learn", "1.4.2"),
        ("tqdm", "4.66.2"),
        ("pytest", "8.4.2"),
    ],
)
def test_a_vulnerable_version_is_found(audit, capsys, package, found):
    well, _ = audit.audit("injected", {package: found}, audit.advisories(), online=False)
    assert not well and "VULNERABLE" in capsys.readouterr().out


def test_an_accepted_one_is_said_with_its_reason_and_a_good_one_is_not(audit, capsys):
    well, _ = audit.audit(
        "injected", {"lightning": "2.1.2", "jinja2": "3.1.6"}, audit.advisories(), online=False
    )
    out = capsys.readouterr().out
    assert well and "accepted: never called" in out and "jinja2 3.1.6" not in out


def test_every_requirement_is_read_with_its_lower_bound(audit, tmp_path):
    (tmp_path / "setup.cfg").write_text(
        "[options]\ninstall_requires =\n    torch>=2.10\n    numpy\n[options.extras_require]\ntest =\n"
        "    # of the tests\n    pytest>=9.0.3\n    numpy>=1.26\n    tqdm\n"
    )
    (tmp_path / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools>=83"]\n')
    bounds, without = audit.lower_bounds(audit.requirements(tmp_path))
    assert bounds == {"torch": "2.10", "pytest": "9.0.3", "numpy": "1.26", "setuptools": "83"}
    assert without == ["tqdm"]


@pytest.mark.fault("security")
def test_what_pip_audit_could_not_check_is_said_and_fails_where_it_must(audit, capsys, monkeypatch):
    def unreachable(words, **kwargs):
        return subprocess.CompletedProcess(words, 1, "", "ConnectionError")

    monkeypatch.setattr(audit.subprocess, "run", unreachable)
    well, unchecked = audit.audit("injected", {"jinja2": "3.1.6"}, audit.advisories(), online=True)
    assert well and unchecked == ["jinja2"]
    assert "NOT CHECKED by pip-audit, as PyPI did not answer for all of them" in capsys.readouterr().out
    monkeypatch.setattr(audit, "requirements", lambda: [packaging.requirements.Requirement("jinja2>=3.1.6")])
    assert audit.main([]) == 0 and audit.main(["--strict"]) == 3


@pytest.mark.fault("security")
def test_what_only_pip_audit_knows_is_a_failure(audit, capsys, monkeypatch):
    answer = '{"dependencies": [{"name": "jinja2", "version": "9", "vulns": [{"id": "X-1", "aliases": []}]}]}'
    monkeypatch.setattr(
        audit.subprocess, "run", lambda words, **kwargs: subprocess.CompletedProcess(words, 1, answer, "")
    )
    well, unchecked = audit.audit("injected", {"jinja2": "9"}, audit.advisories(), online=True)
    assert not well and unchecked == [] and "X-1" in capsys.readouterr().out
