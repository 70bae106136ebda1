"""A map of a checkpoint's features: ``python main_umap.py --pretrained_checkpoint_dir RUN``."""

from metamask_plugin.cli.umap import main

if __name__ == "__main__":
    main()
