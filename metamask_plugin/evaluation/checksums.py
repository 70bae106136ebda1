"""Whether a file of ``torch.save`` is as it was written."""

import zipfile
import zlib
from pathlib import Path

from metamask_plugin.errors import UserError


def check_records(path: Path) -> None:
    """Compares every record with its CRC-32, which ``torch.save`` writes and ``torch.load`` ignores.

    A file in PyTorch's format from before 1.6 has no checksums and passes.

    Args:
        path: the file.

    Raises:
        UserError: it is truncated, or a record is not what was written.
    """
    try:
        if not zipfile.is_zipfile(path):
            return  # of the older format, or no such file at all: torch.load will tell
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, ValueError) as error:
        damaged = str(error)
    if damaged is not None:
        raise UserError(
            f"checkpoint {path} must be as torch.save wrote it, got other bytes ({damaged} does not match "
            "its checksum); copy it again or take another"
        )
