"""Result tables: several encoders side by side, as text and as JSON."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metamask_plugin.audit.statistics import standard_error
from metamask_plugin.errors import printable
from metamask_plugin.evaluation.features import Features, accuracy, extract_features, raw_pixels
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.knn import knn_hits, masked_features, vote_temperature
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.linear import LinearProtocol, linear_probe

RAW_PIXELS = "raw pixels"
ERROR = "_standard_error"
"""Ends the key of what is one."""


def evaluate_rows(
    images: LabelledImages,
    backbones: Mapping[str, nn.Module],
    masks: Mapping[str, torch.Tensor] | None = None,
    pixels: bool = True,
    ks: Sequence[int] = (5, 20, 200),
    temperature: float | None = None,
    protocol: str | LinearProtocol | None = "paper",
    head: str = "linear",
    seed: int = 0,
    device: torch.device | str | None = None,
    say: Callable[[str], None] | None = None,
    originals: torch.Tensor | None = None,
) -> list[dict[str, Any]]:
    """Evaluates raw pixels and encoders on the same data, by kNN and a probe.

    Args:
        images: training and test images.
        backbones: by the name of their row, e.g. ``"random initialisation"``.
        masks: effective mask weights (D,) by the same names; each adds a row ``"<name>, masked"``.
        pixels: whether the images themselves are the first row.
        ks: numbers of neighbours.
        temperature: of the votes; by default :func:`~metamask_plugin.evaluation.knn.vote_temperature`'s.
        protocol: of the probe, see :func:`~metamask_plugin.evaluation.linear.linear_probe`; None
            leaves the probe out.
        head: ``"linear"`` or ``"mlp"``.
        seed: of the probe.
        device: where to compute; by default where each backbone is.
        say: called with the name of each row before its evaluation.
        originals: what each test image shows, where several show the same; standard errors are then over
            originals, see :func:`~metamask_plugin.audit.statistics.standard_error`.

    Returns:
        Rows with ``features`` (the name), ``dim`` (D), ``knn<k>`` for each k, and the head's name with
        ``<head>_best`` beside it (last and best epoch). Accuracies in percent. Of the first k and the head
        also ``<metric>_standard_error``, in percentage points.

    Raises:
        UserError: when features are not finite, or do not fit a mask.

    >>> images = LabelledImages.read({"dataset": "digits", "kwargs": {"size": 16}}, crop_size=16)
    >>> (row,) = evaluate_rows(images, {}, ks=(5,), protocol=None)
    >>> row["features"], row["dim"], row["knn5"] > 90
    ('raw pixels', 768, True)
    """
    say = say or (lambda name: None)
    masks = masks or {}
    rows = []

    def add(name: str, train: Features, test: Features, mask: torch.Tensor | None = None) -> None:
        say(name)
        known, unknown = (train, test) if mask is None else (masked_features(f, mask) for f in (train, test))
        row = {"features": name, "dim": train.feats.shape[1]}
        sizes = list(dict.fromkeys(min(k, len(train.labels)) for k in ks))
        hits = knn_hits(known, unknown, sizes, temperature, device=device)
        row |= {f"knn{k}": accuracy(found).acc1 for k, found in hits.items()}
        row[f"knn{sizes[0]}{ERROR}"] = standard_error(hits[sizes[0]][:, 0], originals)
        if protocol is not None:
            num_classes = int(max(train.labels.max(), test.labels.max())) + 1
            result = linear_probe(train, test, num_classes, protocol, head, seed, device, mask)
            row |= {head: result.acc1_last, f"{head}_best": result.acc1_best}
            row[head + ERROR] = standard_error(result.correct, originals)
        rows.append(row)

    if pixels:
        add(RAW_PIXELS, *(raw_pixels(images.evaluation_loader(split)) for split in ("train", "test")))
    for name, backbone in backbones.items():
        train, test = (
            extract_features(backbone, images.evaluation_loader(split), device) for split in ("train", "test")
        )
        add(name, train, test)
        if masks.get(name) is not None:
            add(f"{name}, masked", train, test, masks[name])
    return rows


def without_errors(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows of :func:`evaluate_rows` for a table, which has no room for standard errors.

    >>> without_errors([{"knn5": 80.0, "knn5_standard_error": 1.8}])
    [{'knn5': 80.0}]
    """
    return [{key: value for key, value in row.items() if not key.endswith(ERROR)} for row in rows]


def errors_in_words(rows: Sequence[Mapping[str, Any]], originals: torch.Tensor | None) -> str:
    """The largest standard error of rows, in one line.

    >>> errors_in_words([{"knn5": 80.0, "knn5_standard_error": 1.8}], None)
    'One standard error of a single accuracy, over test images: at most 1.8 points.'
    """
    errors = [value for row in rows for key, value in row.items() if key.endswith(ERROR)]
    units = "test images" if originals is None else f"{len(originals.unique())} originals"
    return f"One standard error of a single accuracy, over {units}: at most {max(errors):.1f} points."


def format_table(rows: Sequence[Mapping[str, Any]], width: int = 80) -> str:
    """Aligns rows under their keys, numbers to the right and with two decimals.

    Columns come in the order in which keys first appear; a missing value is a dash. Where the lines
    would be longer than ``width``, the cells of the first column are shortened.

    Args:
        rows: dictionaries of strings and numbers.
        width: characters a line may have.

    >>> print(format_table([{"features": "raw pixels", "knn5": 41.2}, {"features": "trained", "dim": 256}]))
    features     knn5  dim
    ----------------------
    raw pixels  41.20    -
    trained         -  256
    """
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if not columns:
        return "(no rows)"
    cells = [columns] + [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    rest = sum(widths[1:]) + 2 * (len(columns) - 1)
    widths[0] = max(min(widths[0], width - rest), min(widths[0], 8))
    lines = []
    for line in cells:
        first = line[0] if len(line[0]) <= widths[0] else line[0][: widths[0] - 1] + "…"
        numbers = "".join(f"  {cell:>{w}}" for cell, w in zip(line[1:], widths[1:]))
        lines.append((first.ljust(widths[0]) + numbers).rstrip())
    lines.insert(1, "-" * max(len(line) for line in lines))
    return "\n".join(lines)


def evaluation_in_words(ks: Sequence[int], temperature: float | None, protocol: LinearProtocol) -> str:
    """How the numbers of a table come about, in one line.

    >>> from metamask_plugin.evaluation.linear import PROTOCOLS
    >>> print(evaluation_in_words([5, 20], None, PROTOCOLS["fast"]))
    kNN: cosine, votes exp(cos / T), T = 1 (k = 5), 0.07 (k = 20). Probe: standardised features, 100 epochs.
    """
    by_temperature: dict[float, list[str]] = {}
    for k in ks:
        by_temperature.setdefault(vote_temperature(k, temperature), []).append(str(k))
    votes = ", ".join(f"{value:g} (k = {', '.join(own)})" for value, own in by_temperature.items())
    scaled = {"standardise": "standardised features", "l2": "features of unit length"}[protocol.scaling]
    return f"kNN: cosine, votes exp(cos / T), T = {votes}. Probe: {scaled}, {protocol.epochs} epochs."


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else printable(str(value))


def write_summary(path: str | Path, summary: Mapping[str, Any]) -> None:
    """Writes a JSON file at once: a reader finds the old one or the new one, never a half.

    Numbers that are not finite become null, which JSON has a word for; tensors become lists.

    Args:
        path: the file; its directory is made.
        summary: nested mappings, sequences, numbers, strings, tensors and paths.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "summary.json"
    >>> write_summary(path, {"knn5": torch.tensor(41.5), "loss": math.nan})
    >>> json.loads(path.read_text())
    {'knn5': 41.5, 'loss': None}
    """
    write_whole(Path(path), json.dumps(_plain(summary), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors and NumPy's arrays and numbers
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)
