"""What is measured: a trained encoder, its last and its best epoch, and labelled images."""

import csv
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import nn

from metamask_plugin.errors import check
from metamask_plugin.evaluation.encoder import Encoder
from metamask_plugin.evaluation.features import Features, extract_features
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data
from metamask_plugin.host import load_encoder
from metamask_plugin.training.run_folder import RunFolder

ANEW = "remove that folder, and the trial is trained anew"


@dataclass
class Measured:
    """What a measure found of one encoder.

    Attributes:
        rows: tidy rows: ``checkpoint``, ``metric``, ``value``, and columns of the measure's own.
        pictures: by file name.
        details: what is no row, for the trial's record; plain values.
        about: what the report says of all trials that have it.

    Example:
        >>> Measured([{"metric": "knn5", "value": 87.2}]).pictures
        {}
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Figure] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    about: str = ""


@dataclass
class Subject:
    """An encoder at one or two of its epochs, and the images to measure it on.

    Attributes:
        title: what stands on pictures.
        seed: of what the measures draw.
        encoders: by checkpoint, ``last`` and maybe ``best``.
        data: labelled images.
        folder: of its run, or None for an encoder that was there already.
        model: the whole method as it was initialised, to count its parameters; or None.

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(768, 4))
        >>> images = LabelledImages.read({"dataset": "digits", "kwargs": {"size": 16}}, crop_size=16)
        >>> subject = Subject("untrained", 0, {"last": Encoder(network)}, images)
        >>> subject.features("test").feats.shape
        torch.Size([500, 4])
    """

    title: str
    seed: int
    encoders: dict[str, Encoder]
    data: LabelledImages
    folder: Path | None = None
    model: nn.Module | None = None

    def __post_init__(self):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._features: dict[tuple[str, str], Features] = {}

    @property
    def mask(self) -> torch.Tensor | None:
        """The learned mask after the last epoch, (D,), or None."""
        return self.encoders["last"].mask

    def features(self, split: str, checkpoint: str = "last") -> Features:
        """Of the ``train`` or ``test`` images, extracted once."""
        key = (split, checkpoint)
        if key not in self._features:
            backbone = self.encoders[checkpoint].backbone
            self._features[key] = extract_features(backbone, self.data.evaluation_loader(split), self.device)
        return self._features[key]

    def by_checkpoint(self, measure: Callable[[str], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The rows of a measure at each checkpoint, which is measured once where the best epoch is the last.

        Args:
            measure: from ``last`` or ``best`` to rows without the column ``checkpoint``.
        """
        rows, done = [], {}
        for checkpoint, encoder in self.encoders.items():
            if id(encoder) not in done:
                done[id(encoder)] = measure(checkpoint)
            rows += [{"checkpoint": checkpoint, **row} for row in done[id(encoder)]]
        return rows

    def history(self) -> list[dict[str, str]]:
        """The epochs in the run's ``metrics.csv``."""
        check(self.folder is not None, "measures", "ones of a frozen encoder for a checkpoint", "cost")
        path = self.folder / "metrics.csv"
        check(path.is_file(), "metrics.csv", f"in the run folder {self.folder}", None, ANEW)
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            return list(csv.DictReader(file))


def subject_of_run(run: RunFolder, seed: int, title: str, model: nn.Module | None = None) -> Subject:
    """The encoder of a finished run, on the data it was trained on."""
    paths = {"last": run.last_checkpoint, "best": run.best_checkpoint}
    check(paths["last"].exists(), "the trial's run", "one with a last.ckpt to measure", str(run.path), ANEW)
    encoders = {name: load_encoder(path) for name, path in paths.items() if path.exists()}
    if "best" in encoders and _same(encoders["best"].backbone, encoders["last"].backbone):
        encoders["best"] = encoders["last"]
    data = _labelled(encoders["last"], {})
    return Subject(title, seed, encoders, data, run.path, model)


def subject_of_checkpoint(checkpoint: str, data: Mapping[str, Any], seed: int, title: str) -> Subject:
    """Any encoder: ours, solo-learn's, or ``timm:<model>``.

    Args:
        checkpoint: see :func:`~metamask_plugin.evaluation.encoder.load_encoder`.
        data: a ``data`` node; over what the checkpoint was trained on. ``crop_size``, ``mean`` and ``std`` in
            it go before the encoder's own.
        seed: of what the measures draw.
        title: what stands on pictures.

    Example:
        >>> data = {"dataset": "cifar10", "train_path": "data", "crop_size": 32}
        >>> subject_of_checkpoint("timm:resnet18", data, 0, "ImageNet")  # doctest: +SKIP
    """
    encoder = load_encoder(checkpoint, image_size=data.get("crop_size"))
    return Subject(title, seed, {"last": encoder}, _labelled(encoder, data))


def _same(first: nn.Module, second: nn.Module) -> bool:
    pairs = zip(first.state_dict().values(), second.state_dict().values())
    return all(torch.equal(one, other) for one, other in pairs)


def _labelled(encoder: Encoder, given: Mapping[str, Any]) -> LabelledImages:
    given = dict(given)
    view = {key: given.pop(key, None) or encoder.view.get(key) for key in ("crop_size", "mean", "std")}
    return _read(json.dumps([merged_data(encoder.args, given), view], sort_keys=True, default=str))


@functools.lru_cache(maxsize=2)
def _read(key: str) -> LabelledImages:
    """Trials of one process mostly share their images: these are read once."""
    data, view = json.loads(key)
    return LabelledImages.read(data, **view)
