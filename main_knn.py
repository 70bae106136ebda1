"""Evaluates a checkpoint by nearest neighbours: ``python main_knn.py --pretrained_checkpoint_dir RUN``."""

import sys

from metamask_plugin.cli.main import main

if __name__ == "__main__":
    main(["knn", *sys.argv[1:]])
