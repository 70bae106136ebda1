"""The image files below a folder, in torchvision's order, and what of it could not be listed.

torchvision's ``make_dataset`` leaves out folders that it may not read, and follows a link to a folder above
itself until the operating system stops it, which lists every image forty times; neither is said.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from metamask_plugin.data.unreadable import SkippedImage, one_line, printable
from metamask_plugin.errors import UserError


def image_files(folder: str | Path, root: str | Path | None = None) -> tuple[list[str], list[SkippedImage]]:
    """The image files below ``folder``, by folder and then by name, as torchvision's ``make_dataset``.

    Links to folders are followed, but not to one that is being listed already.

    Args:
        folder: where to begin.
        root: the folder above that is part of the same data set; a link to it leads back, too.

    Returns:
        the paths, and the folders that could not be listed: unreadable ones, loops, links to nowhere.
    """
    faults: list[SkippedImage] = []
    above = () if root is None else (os.path.realpath(root),)
    if os.path.islink(folder) and _leads_back(os.path.realpath(folder), above):
        return [], [_loop(str(folder))]
    folders = sorted(_folders(str(folder), above, faults))
    return [os.path.join(place, name) for place, names in folders for name in names], faults


def is_image_name(name: str) -> bool:
    """Whether torchvision would take a file of this name for an image."""
    return name.lower().endswith(IMG_EXTENSIONS)


def listing(folder: Path) -> list[Path]:
    """What lies in ``folder``; one clear line where that cannot be found out."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries]
    except FileNotFoundError:
        found, remedy = "no such folder", "correct data.train_path or data.val_path"
    except NotADirectoryError:
        found, remedy = "a file", "name the folder that holds the class folders"
    except PermissionError:
        found, remedy = "no permission to read it", f"run: chmod u+rx {printable(folder)}"
    except OSError as error:
        found, remedy = one_line(error), "check the disk or the mount"
    raise UserError(f"image folder {printable(folder)} must be a readable folder, got {found}; {remedy}")


def lost_folder(path: str | Path) -> SkippedImage | None:
    """A link to nowhere that may have been a folder, to judge by its name, which has no extension."""
    if os.path.splitext(path)[1] or not os.path.islink(path) or os.path.exists(path):
        return None
    target = printable(os.readlink(path))
    return SkippedImage(str(path), f"a symbolic link to {target}, which cannot be followed")


def _folders(
    folder: str, above: tuple[str, ...], faults: list[SkippedImage]
) -> Iterator[tuple[str, list[str]]]:
    """Each folder from ``folder`` down with its images' names; ``above``, the real places on the way."""
    here = (*above, os.path.realpath(folder))
    names, below = [], []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                (below if _is_folder(entry) else names).append((entry.name, entry.is_symlink()))
    except OSError as error:
        reason = "no permission to read it" if isinstance(error, PermissionError) else one_line(error)
        faults.append(SkippedImage(folder, f"a folder that cannot be listed, {reason}"))
        return
    for name, linked in sorted(names):
        lost = lost_folder(os.path.join(folder, name)) if linked else None
        faults.extend([lost] if lost else [])
    yield folder, sorted(name for name, _ in names if is_image_name(name))
    for name, linked in sorted(below):
        path = os.path.join(folder, name)
        if linked and _leads_back(os.path.realpath(path), here):
            faults.append(_loop(path))
        else:
            yield from _folders(path, here, faults)


def _loop(path: str) -> SkippedImage:
    target = printable(os.readlink(path))
    return SkippedImage(path, f"a symbolic link to {target}, which leads back to the folder it is in")


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that turns in circles, or one into a folder that is closed
        return False


def _leads_back(target: str, here: tuple[str, ...]) -> bool:
    """Whether ``target`` is one of the places on the way, or lies above one."""
    return any(place == target or place.startswith(os.path.join(target, "")) for place in here)
