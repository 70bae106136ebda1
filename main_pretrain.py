"""Pretrains an encoder: ``python main_pretrain.py --config-name metamask_barlow [key=value ...]``."""

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.2", config_path="scripts/pretrain")
def main(cfg: DictConfig) -> None:
    from metamask_plugin.cli.pretrain import run

    run(cfg)


if __name__ == "__main__":
    main()
