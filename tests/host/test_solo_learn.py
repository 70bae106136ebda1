"""The contract, and our methods, on solo-learn itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROOT = Path(os.environ.get("SOLO_LEARN_ROOT", Path.home() / "solo-learn"))

pytestmark = [
    pytest.mark.solo_learn,
    pytest.mark.skipif(
        not (ROOT / "solo" / "methods" / "base.py").exists(),
        reason=f"no solo-learn checkout at {ROOT}; set SOLO_LEARN_ROOT",
    ),
]


def under_solo(*args):
    env = {**os.environ, "METAMASK_HOST": "solo", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=TESTS.parent)


@pytest.mark.parametrize(
    "tests", ["host/test_contract.py", "methods/test_metamask_gradient.py", "methods/test_metamask.py"]
)
def test_our_tests_pass_on_solo_learns_base_method(tests):
    done = under_solo(
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        "-k",
        "not resnet50 and not test_convnext and not test_vit",
        str(TESTS / tests),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


def test_the_host_is_solo_learn_and_has_our_encoders():
    done = under_solo(
        "-c",
        "from metamask_plugin.host import name, BaseMethod as ours\n"
        "from solo.methods.base import BaseMethod as theirs\n"
        "print(name, ours is theirs, 'conv4' in theirs._BACKBONES)",
    )
    assert done.stdout.split() == ["solo", "True", "True"], done.stderr[-2000:]
