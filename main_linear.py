"""Trains a probe on a frozen encoder.

``python main_linear.py --config-name confounded_digits pretrained_feature_extractor=RUN/last.ckpt``
"""

import sys

from metamask_plugin.cli.main import main

if __name__ == "__main__":
    main(["linear", *sys.argv[1:]])
