"""The papers' tables and figures: ``python main_study.py --config-name metamask_table2 [key=value ...]``.

What stands behind ``--`` goes to the pretraining of every trial, as on ``main_pretrain.py``'s command line:

    python main_study.py --config-name metamask_fig6 size=digits -- task=byol optimizer.lr=1e-3

``python main_study.py --list`` shows the studies with their settings.
"""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.2", config_path="scripts/study")
def main(cfg: DictConfig) -> None:
    from metamask_plugin.cli.study import run_trial

    run_trial(cfg)


if __name__ == "__main__":
    if "--list" in sys.argv:
        from metamask_plugin.cli.study import catalogue

        print(catalogue())
    else:
        from metamask_plugin.cli.hydra_errors import hydra_errors
        from metamask_plugin.cli.study import with_pretraining_overrides

        sys.argv = with_pretraining_overrides(sys.argv)
        with hydra_errors("study", sys.argv):
            main()
