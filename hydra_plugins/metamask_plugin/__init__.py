"""Puts this package's configs on Hydra's search path, and its methods into solo-learn.

Hydra imports everything in the namespace ``hydra_plugins`` before it composes a config. So with the package
installed, solo-learn's untouched ``main_pretrain.py --config-name metamask_barlow`` finds config and method.
"""

import os
import sys
from pathlib import Path

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin

HERE = ("main_pretrain", "main_linear")
"""Scripts of either project; another Hydra application is left alone."""


class MetaMaskSearchPath(SearchPathPlugin):
    """Behind all other folders: our configs, and before them, where a script brings none, those for CIFAR.

    So ``metamask_barlow`` means CIFAR-10 in solo-learn's clone, and the quick start in ours. Behind another
    data set's folder the CIFAR ones would lend it their views.
    """

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        script = Path(sys.argv[0]).stem
        if "solo.methods" in sys.modules:
            own = sys.modules["solo.methods"].METHODS.get("metamask")
            if own is not None and own.__module__.startswith("solo."):
                return  # a solo-learn that has our methods itself
            import metamask_plugin.methods  # noqa: F401  registers them
        elif "metamask_plugin" not in sys.modules and script not in HERE:
            return
        from metamask_plugin import SCRIPTS
        from metamask_plugin.cli.main import COMMAND

        main = [element.path or "" for element in search_path.get_path() if element.provider == "main"]
        folders = [Path(path.removeprefix("file://")) for path in main]
        if any(folder.parent == SCRIPTS for folder in folders):
            return  # our own command, whose configs are there already
        kind = script.removeprefix("main_") if script in HERE else os.environ.get(COMMAND)
        probes = SCRIPTS / "linear"
        if any(folder.resolve().is_relative_to(probes.resolve()) for folder in folders):
            kind = "linear"  # whatever the script's name
        configs = probes if kind == "linear" else SCRIPTS / "pretrain"
        brings_its_own = bool(main)
        for folder in (configs,) if brings_its_own else (configs / "cifar", configs):
            search_path.append("metamask_plugin", f"file://{folder}")
