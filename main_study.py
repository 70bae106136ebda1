"""The papers' tables and figures: ``python main_study.py --config-name metamask_table2 [key=value ...]``.

What stands behind ``--`` goes to the pretraining of every trial, as on ``main_pretrain.py``'s command line:

    python main_study.py --config-name metamask_fig6 size=digits -- task=byol optimizer.lr=1e-3

``python main_study.py --list`` shows the studies with their settings.
"""

import sys

from metamask_plugin.cli.main import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
