"""Lists the images below some folders that cannot be read, a line each with the reason:

    metamask-ssl verify <folder> [<folder> ...] [--decode]

The lines go to stdout, the count to stderr; the exit code is 1 where there are any.
"""

import sys
from pathlib import Path

from metamask_plugin.cli.parsers import verify as parse_args
from metamask_plugin.data.image_tree import image_files, listing
from metamask_plugin.data.remarks import tell_left_out
from metamask_plugin.data.unreadable import SkippedImage
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
            faults, count = _look(folder, level)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        for fault in faults:
            print(fault)
        found, images = found + len(faults), images + count
    print(f"{found} of {images} images cannot be read", file=sys.stderr)
    return 1 if found else 0


def _look(folder: str, level: str) -> tuple[list[SkippedImage], int]:
    """What cannot be read below a folder, and the number of its images."""
    listing(Path(folder))
    there = image_files(folder)
    tell_left_out([there])
    reasons = unreadable(there.paths, level)
    unread = [SkippedImage(there.paths[index], reason) for index, reason in reasons.items()]
    return [*there.faults, *unread], len(there.paths)
