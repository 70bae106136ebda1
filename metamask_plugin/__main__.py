"""Runs a script of solo-learn with our methods registered: ``python -m metamask_plugin main_knn.py ...``.

Its scripts that use Hydra need no such help; ``main_knn.py`` and ``main_umap.py`` do not.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Takes the script and its arguments from the command line."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        found = " ".join(sys.argv[1:2]) or "nothing"
        sys.exit(f"python -m metamask_plugin must be given a script of solo-learn, got {found}")
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # where Python looks first for a script
    import metamask_plugin.methods  # noqa: F401  registers them

    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
