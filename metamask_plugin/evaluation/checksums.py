"""Whether a file of ``torch.save`` is as it was written, and whether it is the same as another."""

import hashlib
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


def content_digest(path: Path) -> str:
    """Hex digits that differ where two files hold something else, whatever their dates say.

    Of a checkpoint only the list of its records is read, with their sizes and checksums.

    Args:
        path: the file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = [(record.filename, record.file_size, record.CRC) for record in archive.infolist()]
        return hashlib.sha256(repr(records).encode()).hexdigest()[:16]
    except (zipfile.BadZipFile, ValueError, NotImplementedError):
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest()[:16]
