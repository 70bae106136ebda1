"""Where solo-learn's main branch is, for the tests marked ``solo_learn``."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
ROOT = Path(os.environ.get("SOLO_LEARN_ROOT", Path.home() / "solo-learn"))

needs_solo_learn = [
    pytest.mark.solo_learn,
    pytest.mark.skipif(
        not (ROOT / "solo" / "methods" / "base.py").exists(),
        reason=f"no solo-learn checkout at {ROOT}; set SOLO_LEARN_ROOT",
    ),
]


def under_solo(*args, cwd=REPOSITORY, **environment):
    """Runs Python with solo-learn importable and chosen as the host."""
    env = {**os.environ, "METAMASK_HOST": "solo", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, env=env, cwd=cwd)
