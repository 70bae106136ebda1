"""A map of a checkpoint's features: ``python main_umap.py --pretrained_checkpoint_dir RUN``."""

import sys

from metamask_plugin.cli.main import main

if __name__ == "__main__":
    main(["umap", *sys.argv[1:]])
