"""Which host is chosen, each case in a process of its own: the choice is made once, at import."""

import os
import subprocess
import sys

import pytest

SHOW = "import metamask_plugin.host as host; print(host.name)"


def decide(tmp_path, base=None, choice=None):
    """Runs the switch beside a package ``solo`` whose base module is the given source."""
    env = {key: value for key, value in os.environ.items() if key not in ("METAMASK_HOST", "PYTHONPATH")}
    if choice is not None:
        env["METAMASK_HOST"] = choice
    if base is not None:
        package = tmp_path / "solo" / "methods"
        package.mkdir(parents=True)
        (tmp_path / "solo" / "__init__.py").touch()
        (package / "__init__.py").write_text("METHODS = {}\n")
        (package / "base.py").write_text(base)
        env["PYTHONPATH"] = str(tmp_path)
    return subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, env=env, cwd=tmp_path)


CURRENT = "class BaseMethod:\n    _BACKBONES = {}\n    def __init__(self, cfg): ...\n"
OLD = "class BaseMethod:\n    def __init__(self, backbone, num_classes): ...\n"


def test_embedded_without_solo_learn(tmp_path):
    assert decide(tmp_path).stdout.strip() == "embedded"


def test_solo_learn_where_it_is(tmp_path):
    assert decide(tmp_path, CURRENT).stdout.strip() == "solo"


@pytest.mark.slow
def test_the_variable_overrides(tmp_path):
    assert decide(tmp_path, CURRENT, "embedded").stdout.strip() == "embedded"


@pytest.mark.slow
def test_an_old_solo_learn_is_passed_over_with_a_reason(tmp_path):
    done = decide(tmp_path, OLD)
    assert done.stdout.strip() == "embedded" and "takes no cfg" in done.stderr


@pytest.mark.slow
def test_a_broken_solo_learn_is_passed_over_with_a_reason(tmp_path):
    done = decide(tmp_path, "import pkg_resources_that_is_gone\n")
    assert done.stdout.strip() == "embedded" and "its import fails" in done.stderr


@pytest.mark.parametrize(
    ("choice", "message"), [("solo", "it is not installed"), ("lightly", "METAMASK_HOST must be one of")]
)
def test_impossible_choices(tmp_path, choice, message):
    done = decide(tmp_path, choice=choice)
    assert done.returncode != 0 and message in done.stderr
