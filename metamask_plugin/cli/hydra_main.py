"""The commands that take a config: Hydra composes it, then the command itself is imported and run.

Each function is a task function of Hydra's, which finds it by its module, from a launcher's processes too.
"""

import sys
from collections.abc import Callable, Sequence

import hydra
from omegaconf import DictConfig

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.checked import check_ablation, checked_linear, checked_pretraining
from metamask_plugin.cli.command_line import early_paths, understood
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.hydra_errors import hydra_errors


@hydra.main(version_base="1.2", config_path=str(SCRIPTS / "pretrain"))
def pretrain(cfg: DictConfig) -> None:
    """Trains an encoder."""
    with one_line_errors():
        check_ablation(cfg)
        checked_pretraining(cfg, quiet=True)
    from metamask_plugin.cli.pretrain import run

    run(cfg)


@hydra.main(version_base="1.2", config_path=str(SCRIPTS / "linear"))
def linear(cfg: DictConfig) -> None:
    """Trains a probe."""
    with one_line_errors():
        checked_linear(cfg)
    from metamask_plugin.cli.linear import run

    run(cfg)


@hydra.main(version_base="1.2", config_path=str(SCRIPTS / "study"))
def study(cfg: DictConfig) -> None:
    """Runs one trial of a study; the sweeper runs this for each."""
    from metamask_plugin.cli.study import run_trial

    run_trial(cfg)


KINDS: dict[str, Callable[[], None]] = {"pretrain": pretrain, "linear": linear, "study": study}


def run(kind: str, words: Sequence[str]) -> None:
    """Understands the command line, and lets Hydra do the rest.

    Args:
        kind: a key of :data:`KINDS`.
        words: the command line without its command.

    Raises:
        SystemExit: with code 2 and one line, for what the user can mend.
    """
    with one_line_errors():
        words = understood(kind, words)
        early_paths(kind, words)
    sys.argv = [sys.argv[0], *words]
    with hydra_errors(kind, sys.argv):
        KINDS[kind]()
