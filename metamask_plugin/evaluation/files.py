"""Text files that are there whole or not at all."""

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replaces a file at once: a reader finds the old one or the new one, never a half.

    Args:
        path: the file; its directory is made.
        text: its content, written as UTF-8 with the line ends that it has.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
            file.write(text)
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the result from one's colleagues
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
