"""Composes the package's configs, without Hydra's application; a training of seconds."""

import os
from pathlib import Path

from hydra import compose, initialize_config_dir

from metamask_plugin import SCRIPTS

TESTS = Path(__file__).resolve().parent
PATHS = os.pathsep.join(map(str, (TESTS / "reliability", TESTS, TESTS.parent)))
"""``PYTHONPATH`` of a process that imports the package and modules of the tests."""

TINY = (
    *("backbone.name=conv4", "++backbone.kwargs.width=4", "++data.fraction=0.1", "++data.kwargs.copies=1"),
    *("++data.kwargs.test_copies=1", "optimizer.batch_size=32", "max_epochs=3", "accelerator=cpu"),
)
"""Three epochs of four batches of the confounded digits."""


def composed(kind, name, *overrides):
    """A config of ``scripts/<kind>``."""
    with initialize_config_dir(str((SCRIPTS / kind).resolve()), version_base="1.2"):
        return compose(name, list(overrides))


def tiny(folder, *overrides, name="metamask_barlow"):
    """The config of a tiny training whose run is in ``folder``."""
    return composed("pretrain", name, *TINY, f"checkpoint.dir={folder}", *overrides)
