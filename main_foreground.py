"""Tests on foregrounds and backgrounds: ``python main_foreground.py --pretrained_checkpoint_dir RUN ...``."""

import sys

from metamask_plugin.cli.main import main

if __name__ == "__main__":
    main(["foreground", *sys.argv[1:]])
