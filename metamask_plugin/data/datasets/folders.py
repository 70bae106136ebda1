"""Image files in folders, in torchvision's order, without hidden files and those of desktops and file servers."""

import os
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any, NoReturn

import torch
from torchvision.datasets.folder import IMG_EXTENSIONS

from metamask_plugin.data.splits import FileImages, Splits
from metamask_plugin.errors import UserError, check, printable
from metamask_plugin.retry import retried

SET_PATH = "set data.train_path=<folder>, or --train_data_path of a command with flags"
EXTENSIONS = (*IMG_EXTENSIONS, ".jfif", ".jpe", ".gif", ".avif", ".jp2")
"""torchvision's, and others that Pillow reads."""
SYSTEM_FOLDERS = (
    *("@eadir", "#recycle", "@recycle", "#snapshot", "~snapshot", "$recycle.bin", "__macosx", "lost+found"),
    *("system volume information", "thumbnails", "thumbs"),
)
"""What file servers and desktops put beside images; like names that begin with a dot."""


class FolderImages(FileImages):
    """Image files in class folders: ``<root>/<class>/*.jpg`` and what else Pillow reads.

    Args:
        root: folder that holds one folder a class. Images deeper inside a class folder count, as in
            torchvision's ``ImageFolder``; hidden files and folders do not, see :func:`is_hidden`.

    Raises:
        UserError: a folder is missing or unreadable, there are no class folders, or one has no images.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        entries = [entry for entry in listing(root) if not is_hidden(entry.name)]
        lost = [entry for entry in entries if not entry.suffix and entry.is_symlink() and not entry.exists()]
        if lost:  # one class less would be another task
            _refuse(root, f"{printable(str(lost[0]))}, a link to nothing", "mend the link or remove it")
        classes = sorted(entry.name for entry in entries if entry.is_dir())
        check(
            bool(classes),
            f"image folder {printable(str(root))}",
            "a folder of class folders (<class>/*.jpg)",
            "no class folders",
            "move the images into one folder a class, or set data.dataset=custom data.no_labels=True",
        )
        refuse_folder_of_splits(root, classes)
        found = [image_files(root / name) for name in classes]
        empty = [name for name, paths in zip(classes, found, strict=True) if not paths]
        if empty:
            raise UserError(
                f"image folder {printable(str(root))} must be filled with images in each of its "
                f"{len(classes)} class folders, got 'no image in {len(empty)} of them, the first "
                f"{printable(str(root / empty[0]))}'; fill or remove the empty folders"
            )
        labels = [label for label, paths in enumerate(found) for _ in paths]
        super().__init__([path for paths in found for path in paths], labels, classes)

    @classmethod
    def unlabelled(cls, root: str | Path) -> "FolderImages":
        """All images below ``root``, with label -1 and no classes, in the order of their paths.

        Raises:
            UserError: the folder is missing, unreadable or without images.
        """
        split = cls.__new__(cls)
        split.paths = sorted(image_files(root))
        check(
            bool(split.paths),
            f"image folder {printable(str(root))}",
            f"a folder of images ({', '.join(EXTENSIONS)})",
            "no images",
            "point data.train_path at the folder that holds them",
        )
        split.labels = torch.full((len(split.paths),), -1)
        split.classes = []
        return split


def folder_splits(train_path: str | None, val_path: str | None) -> Splits:
    """Two image folders; without ``val_path`` there is no test split.

    Raises:
        UserError: a folder is missing, unreadable, or not one of class folders.
    """
    check(bool(train_path), "data.train_path", "a folder of class folders", train_path, SET_PATH)
    return FolderImages(train_path), FolderImages(val_path) if val_path else None


def image_files(folder: str | Path) -> list[str]:
    """The image files below ``folder``, by folder and then by name, as torchvision's ``make_dataset``.

    Raises:
        UserError: it, or a folder below, cannot be listed.
    """
    listing(folder)
    places = []
    for place, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_unlisted):
        folders[:] = [name for name in folders if not (is_hidden(name) or _leads_back(place, name))]
        places.append((place, sorted(filter(is_image_name, names))))
    return [os.path.join(place, name) for place, names in sorted(places) for name in names]


def _leads_back(place: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in, whose images would be listed again and again."""
    path = os.path.join(place, name)
    if not os.path.islink(path):
        return False
    here, target = os.path.realpath(place), os.path.realpath(path)
    return os.path.commonpath([here, target]) == target


def listing(folder: str | Path) -> list[Path]:
    """What lies in ``folder``.

    Raises:
        UserError: it cannot be listed.
    """
    try:
        return retried(lambda: list(Path(folder).iterdir()))
    except OSError as error:
        _refuse_unlisted(error)


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name belongs to the system, and not to the data set."""
    return name.startswith(".") or name.lower() in SYSTEM_FOLDERS


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def holds_image(folder: Path) -> bool:
    """Whether an image file lies in ``folder`` itself."""
    return any(is_image_name(entry.name) for entry in listing(folder))


def path_inside(folder: Path, name: Any, source: Path) -> str:
    """The path of an image that the file ``source`` names, which must lie below ``folder``.

    Raises:
        UserError: the name is none, or leads elsewhere.
    """
    usable = isinstance(name, str) and name not in ("", ".") and "\0" not in name
    check(
        usable and not PurePath(name).is_absolute() and ".." not in PurePath(name).parts,
        f"an image's name in {printable(str(source))}",
        "a path below the image folder",
        name,
        "correct the file, or fetch it anew",
    )
    return str(folder / name)


def refuse_folder_of_splits(root: Path, classes: list[str]) -> None:
    """torchvision would take ``train`` and ``test`` for two classes, and the training would run on that."""
    test = next((name for name in ("test", "val") if name in classes), None)
    if "train" in classes and test:
        paths = f"data.train_path={printable(str(root / 'train'))} data.val_path={printable(str(root / test))}"
        _refuse(root, f"the splits {printable(', '.join(classes))}", f"set {paths}")


def _refuse(root: Path, found: str, remedy: str) -> NoReturn:
    raise UserError(
        f"image folder {printable(str(root))} must be a folder of class folders, got {found}; {remedy}"
    )


def _refuse_unlisted(error: OSError) -> NoReturn:
    folder = printable(os.fspath(error.filename))
    found, remedy = {
        FileNotFoundError: ("no such folder", "correct data.train_path or data.val_path"),
        NotADirectoryError: ("a file", "name the folder that holds the class folders"),
        PermissionError: ("no permission to read it", f"run: chmod u+rx {folder}"),
    }.get(type(error), (error.strerror, "check the disk or the mount"))
    raise UserError(f"image folder {folder} must be a readable folder, got {found}; {remedy}") from None
