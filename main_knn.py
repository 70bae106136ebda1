"""Evaluates a checkpoint by nearest neighbours: ``python main_knn.py --pretrained_checkpoint_dir RUN``."""

from metamask_plugin.cli.knn import main

if __name__ == "__main__":
    main()
