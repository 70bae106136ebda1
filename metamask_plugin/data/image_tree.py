"""The image files below a folder, in torchvision's order, and what of it could not be listed or was left out.

torchvision's ``make_dataset`` leaves out folders that it may not read, and follows a link to a folder above
itself until the operating system stops it, which lists every image forty times; neither is said. It takes the
thumbnails and deleted files of desktops and file servers for images, and knows fewer extensions than Pillow.
"""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from torchvision.datasets.folder import IMG_EXTENSIONS

from metamask_plugin.data.image_file import begins_like_image, formats
from metamask_plugin.data.unreadable import SkippedImage, one_line, printable, raise_if_machines
from metamask_plugin.errors import UserError, check
from metamask_plugin.retry import retried

FURTHER = {".jfif": "JPEG", ".jpe": "JPEG", ".gif": "GIF", ".avif": "AVIF", ".jp2": "JPEG2000"}
"""Extensions that torchvision leaves out, and their formats."""
SYSTEM_FOLDERS = (
    "@eadir",
    "#recycle",
    "@recycle",
    "#snapshot",
    "~snapshot",
    "$recycle.bin",
    "__macosx",
    "lost+found",
    "system volume information",
)
"""What file servers and desktops put beside images; like names that begin with a dot."""
THUMBNAILS = ("thumbnails", "thumbs")
# A million files of another kind beside the images are no reason to open a million files.
NO_IMAGES = {".txt", ".json", ".xml", ".csv", ".tsv", ".md", ".html", ".yaml", ".yml", ".db", ".ini", ".npy"}
LOOKED_AT = 2000
LOOKED_AT_OF_AN_EXTENSION = 200


@dataclass
class Listing:
    """What lies below a folder.

    Attributes:
        paths: image files.
        faults: folders that could not be listed: unreadable ones, loops, links to nowhere.
        hidden: image files that are hidden, or in folders of a desktop or a file server.
        others: further files, whose names are not those of images.
    """

    paths: list[str] = field(default_factory=list)
    faults: list[SkippedImage] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def image_files(folder: str | Path, root: str | Path | None = None) -> Listing:
    """The image files below ``folder``, by folder and then by name, as torchvision's ``make_dataset``.

    Links to folders are followed, but not to one that is being listed already.

    Args:
        folder: where to begin.
        root: the folder above that is part of the same data set; a link to it leads back, too.

    Raises:
        MachineFault: the disk or the network fails, again and again.
    """
    found = Listing()
    above = () if root is None else (os.path.realpath(root),)
    if os.path.islink(folder) and _leads_back(os.path.realpath(folder), above):
        found.faults.append(_loop(str(folder)))
        return found
    folders = sorted(_folders(str(folder), above, found))
    found.paths = [os.path.join(place, name) for place, names in folders for name in names]
    return found


@cache
def extensions() -> tuple[str, ...]:
    """Those of image files, with a dot and in small letters."""
    return (*IMG_EXTENSIONS, *(ending for ending, name in FURTHER.items() if name in formats()))


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(extensions()) and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system, and not to the data set."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def images_by_content(others: Iterable[str]) -> tuple[list[str], bool]:
    """Which of the files without an image's name begin like an image.

    At most :data:`LOOKED_AT` files are opened, and :data:`LOOKED_AT_OF_AN_EXTENSION` of one extension.

    Returns:
        the paths; and whether all files were looked at.
    """
    found: list[str] = []
    seen: Counter[str] = Counter()
    complete = True
    for path in others:
        ending = os.path.splitext(path)[1].lower()
        if ending in NO_IMAGES:
            continue
        if seen[ending] >= LOOKED_AT_OF_AN_EXTENSION or seen.total() >= LOOKED_AT:
            complete = False
            continue
        seen[ending] += 1
        if begins_like_image(path):
            found.append(path)
    return found, complete


def path_inside(folder: Path, name: Any, source: Path) -> str:
    """The path of an image that the file ``source`` names, which must lie below ``folder``.

    Raises:
        UserError: the name is none, or leads elsewhere.
    """
    usable = isinstance(name, str) and name not in ("", ".") and "\0" not in name
    check(
        usable and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts,
        f"an image's name in {printable(source)}",
        "a path below the image folder",
        name,
        "correct the file, or fetch it anew",
    )
    return str(folder / name)


def listing(folder: Path) -> list[Path]:
    """What lies in ``folder``; one clear line where that cannot be found out."""
    try:
        return [Path(entry.path) for entry in retried(lambda: _entries(folder))]
    except FileNotFoundError:
        found, remedy = "no such folder", "correct data.train_path or data.val_path"
    except NotADirectoryError:
        found, remedy = "a file", "name the folder that holds the class folders"
    except PermissionError:
        found, remedy = "no permission to read it", f"run: chmod u+rx {printable(folder)}"
    except OSError as error:
        raise_if_machines(f"image folder {printable(folder)}", error)
        found, remedy = one_line(error), "check the disk or the mount"
    raise UserError(f"image folder {printable(folder)} must be a readable folder, got {found}; {remedy}")


def is_folder(entry: os.DirEntry | Path) -> bool:
    """Whether an entry is a folder, or a link to one.

    Raises:
        MachineFault: the disk or the network fails, again and again.
    """
    try:
        return retried(entry.is_dir)
    except OSError as error:  # a link that turns in circles, or one into a folder that is closed
        raise_if_machines(f"image folder {printable(os.fspath(entry))}", error)
        return False


def lost_folder(path: str | Path) -> SkippedImage | None:
    """A link to nowhere that may have been a folder, to judge by its name, which has no extension."""
    if os.path.splitext(path)[1] or not os.path.islink(path) or os.path.exists(path):
        return None
    target = printable(os.readlink(path))
    return SkippedImage(str(path), f"a symbolic link to {target}, which cannot be followed")


def _folders(folder: str, above: tuple[str, ...], found: Listing) -> Iterator[tuple[str, list[str]]]:
    """Each folder from ``folder`` down with its images' names; ``above``, the real places on the way."""
    here = (*above, os.path.realpath(folder))
    try:
        entries = retried(lambda: _entries(folder))
    except OSError as error:
        raise_if_machines(f"image folder {printable(folder)}", error)
        reason = "no permission to read it" if isinstance(error, PermissionError) else one_line(error)
        found.faults.append(SkippedImage(folder, f"a folder that cannot be listed, {reason}"))
        return
    below: list[os.DirEntry] = []
    names: list[str] = []
    for entry in sorted(entries, key=lambda entry: entry.name):
        is_a_folder = is_folder(entry)
        if is_hidden(entry.name) or (is_a_folder and entry.name.lower() in THUMBNAILS):
            found.hidden += _images_below(entry, is_a_folder)
        elif is_a_folder:
            below.append(entry)
        else:
            lost = lost_folder(entry.path) if entry.is_symlink() else None
            found.faults.extend([lost] if lost else [])
            if is_image_name(entry.name):
                names.append(entry.name)
            else:
                found.others.append(entry.path)
    yield folder, names
    for entry in below:
        if entry.is_symlink() and _leads_back(os.path.realpath(entry.path), here):
            found.faults.append(_loop(entry.path))
        else:
            yield from _folders(entry.path, here, found)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return list(entries)


def _images_below(entry: os.DirEntry, is_folder: bool) -> list[str]:
    """The images that are left out with a hidden file or folder; links are not followed."""
    if entry.is_symlink():
        return []
    tree = os.walk(entry.path) if is_folder else [(os.path.dirname(entry.path), [], [entry.name])]
    return [
        os.path.join(place, name)
        for place, _, names in tree
        for name in names
        if name.lower().endswith(extensions())
    ]


def _loop(path: str) -> SkippedImage:
    target = printable(os.readlink(path))
    return SkippedImage(path, f"a symbolic link to {target}, which leads back to the folder it is in")


def _leads_back(target: str, here: tuple[str, ...]) -> bool:
    """Whether ``target`` is one of the places on the way, or lies above one."""
    return any(place == target or place.startswith(os.path.join(target, "")) for place in here)
