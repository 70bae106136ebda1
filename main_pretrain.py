"""Pretrains an encoder: ``python main_pretrain.py --config-name metamask_barlow [key=value ...]``.

``python main_pretrain.py --list`` shows what a config can name.
"""

import sys

from metamask_plugin.cli.main import main

if __name__ == "__main__":
    main(["pretrain", *sys.argv[1:]])
