"""Where the data sets of a study lie."""

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

from metamask_plugin import SCRIPTS

TRAIN = ("train", "train2017")
TEST = ("val", "test", "val2017")
GIVEN = re.compile(r"\+*data\.(train|val)_path=")


def dataset_of(config: str, overrides: Sequence[str]) -> str | None:
    """The data set that a pretraining config trains on: the last override's, else its own."""
    asked = [word.partition("=")[2] for word in overrides if word.lstrip("+").startswith("data.dataset=")]
    return asked[-1] if asked else _dataset_in(config)


def located(root: str) -> tuple[str, ...]:
    """Overrides of the pretraining config for a data set in ``root``.

    A root with subfolders ``train`` and ``val`` (or ``test``, or COCO's) has the splits in them; else it is
    where both are, as torchvision downloads them. COCO's annotations lie beside its splits.
    """
    folder = Path(root).expanduser()
    train, test = (
        next((str(folder / name) for name in names if (folder / name).is_dir()), None)
        for names in (TRAIN, TEST)
    )
    if train is None or test is None:
        train = test = str(folder) if root.startswith("~") else root
    paths = [f"data.train_path={_quoted(train)}", f"data.val_path={_quoted(test)}"]
    boxes = folder / "annotations"  # COCO's
    if boxes.is_dir():
        for split, year in (("train", "train2017"), ("val", "val2017")):
            paths.append(f"data.kwargs.{split}_annotations={_quoted(str(boxes / f'instances_{year}.json'))}")
    return tuple(paths)


def of_one_folder(roots: Mapping[str, str]) -> list[str]:
    """Names of two data sets whose splits would be the same images; none where there are no such."""
    first: dict[str, str] = {}
    for name, root in roots.items():
        train, test = (word.partition("=")[2] for word in located(root)[:2])
        if train != test and train in first:
            return [first[train], name]
        first[train] = name
    return []


def paths_in(overrides: Sequence[str]) -> list[str]:
    """Those of the overrides that give a split's folder."""
    return [word for word in overrides if GIVEN.match(word)]


def remedy(missing: Sequence[str], there: Sequence[str]) -> str:
    """What to add to the command for data sets that are not where the roots say.

    Args:
        missing: their names.
        there: names of the study's other data sets.
    """
    keys = " ".join(f"roots.{name}=<folder>" for name in missing)
    return f"give {keys}" + (f", or take datasets=[{','.join(there)}]" if there else ", or take size=digits")


def _quoted(path: str) -> str:
    """As Hydra's grammar wants it."""
    if re.fullmatch(r"[\w./-]+", path):
        return path
    return "'" + path.replace("\\", "\\\\").replace("'", "\\'") + "'"


@functools.cache
def _dataset_in(config: str) -> str | None:
    file = SCRIPTS / "pretrain" / f"{config}.yaml"
    return OmegaConf.select(OmegaConf.load(file), "data.dataset") if file.is_file() else None
