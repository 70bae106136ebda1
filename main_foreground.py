"""Tests on foregrounds and backgrounds: ``python main_foreground.py --pretrained_checkpoint_dir RUN ...``."""

from metamask_plugin.cli.foreground import main

if __name__ == "__main__":
    main()
