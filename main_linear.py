"""Trains a probe on a frozen encoder.

``python main_linear.py --config-name confounded_digits pretrained_feature_extractor=RUN/last.ckpt``
"""

import sys

import hydra
from omegaconf import DictConfig


@hydra.main(version_base="1.2", config_path="scripts/linear")
def main(cfg: DictConfig) -> None:
    from metamask_plugin.cli.linear import run

    run(cfg)


if __name__ == "__main__":
    from metamask_plugin.cli.hydra_errors import hydra_errors

    with hydra_errors("linear", sys.argv):
        main()
