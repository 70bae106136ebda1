"""``python -m metamask_plugin <command> ...``, see :mod:`~metamask_plugin.cli.main`.

``python -m metamask_plugin main_knn.py ...`` runs a script of solo-learn with our methods registered, which
those need that do not use Hydra.
"""

import sys

from metamask_plugin.cli.main import main, of_solo_learn

if __name__ == "__main__":
    words = sys.argv[1:]
    if words and words[0].endswith(".py"):
        of_solo_learn(words)
    else:
        main()
