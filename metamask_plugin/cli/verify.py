"""Lists the images below some folders that cannot be read, a line each with the reason:

    metamask-ssl verify <folder> [<folder> ...] [--decode]

The lines go to stdout, the count to stderr; the exit code is 1 where there are any.
"""

import sys

from metamask_plugin.cli.parsers import verify as parse_args
from metamask_plugin.data.datasets.folders import image_files
from metamask_plugin.data.images import SkippedImage
from metamask_plugin.data.splits import FileImages
from metamask_plugin.data.verify import unreadable
from metamask_plugin.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Verifies and lists.

    Args:
        arguments: of the command line; by default those of the process.

    Returns:
        the exit code: 2 for a folder that is none, 1 where anything cannot be read, else 0.
    """
    args = parse_args(arguments)
    level = "decode" if args.decode else "header"
    found, images = 0, 0
    for folder in args.folders:
        try:
            paths = image_files(folder)
            reasons = unreadable(FileImages(paths, [0] * len(paths), []), level)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for index, reason in reasons.items():
            print(SkippedImage(paths[index], reason))
        found, images = found + len(reasons), images + len(paths)
    print(f"{found} of {images} images cannot be read", file=sys.stderr)
    return 1 if found else 0
