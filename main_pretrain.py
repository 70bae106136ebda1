"""Pretrains an encoder: ``python main_pretrain.py --config-name metamask_barlow [key=value ...]``.

``python main_pretrain.py --list`` shows what a config can name.
"""

import sys
from pathlib import Path

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.2", config_path="scripts/pretrain")
def main(cfg: DictConfig) -> None:
    from metamask_plugin.cli.pretrain import run

    run(cfg)


if __name__ == "__main__":
    if "--list" in sys.argv:
        from metamask_plugin.cli.catalogue import catalogue

        print(catalogue(Path(__file__).resolve().parent / "scripts" / "pretrain"))
    else:
        from metamask_plugin.cli.hydra_errors import hydra_errors

        with hydra_errors("pretrain", sys.argv):
            main()
