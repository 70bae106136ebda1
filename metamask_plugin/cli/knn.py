"""``main_knn.py``: nearest-neighbour accuracy of a checkpoint, with solo-learn's flags."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.checkpoints import Pretrained, load_pretrained
from metamask_plugin.evaluation.features import Features, extract_features
from metamask_plugin.evaluation.knn import DISTANCES, knn_accuracies, masked_features
from metamask_plugin.evaluation.labelled_data import LabelledData, merged_data
from metamask_plugin.evaluation.report import format_table

FEATURE_TYPES = ("backbone", "masked")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints a table of accuracies; bad input ends it with one line and exit code 2.

    Args:
        argv: the command line without the program's name; by default the process's.
    """
    args = parse_args(argv)
    with one_line_errors():
        print(format_table(run(args)))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """solo-learn's flags of ``main_knn.py``; what is left out is taken from the checkpoint's args.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--pretrained_checkpoint_dir", type=Path, required=True, help="a run's folder, or a checkpoint")
    add("--dataset", help="by default the one it was trained on, as for the paths")
    add("--train_data_path", help="images of the memory bank")
    add("--val_data_path", help="images to classify")
    add("--data_format", help="image_folder or dali, which are read alike")
    add("--data_fraction", type=float, help="share of the bank's images to use, -1 for all")
    add("--mean", type=float, nargs=3, help="per channel, for custom data")
    add("--std", type=float, nargs=3, help="per channel, for custom data")
    add("--batch_size", type=int, default=256, help="images run through the encoder at once")
    add("--num_workers", type=int, help="processes that decode image files")
    add("--k", type=int, nargs="+", default=[5, 20, 200], help="numbers of neighbours")
    add("--temperature", type=float, nargs="+", default=[0.07], help="of the weights, cosine only")
    add("--distance_function", nargs="+", default=["cosine"], help="cosine, euclidean")
    add("--feature_type", nargs="+", help="backbone, masked; by default all that there are")
    add("--backbone", help="the encoder, where no args.json names it")
    add("--crop_size", type=int, help="side of the images in pixels, where no args.json gives it")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluates every combination of feature type, distance, temperature and k.

    Args:
        args: see :func:`parse_args`.

    Returns:
        One row a combination, accuracies in percent.

    Raises:
        UserError: for anything that the user can mend.
    """
    for distance in args.distance_function:
        choose("--distance_function", distance, DISTANCES)
    check(min(args.k) >= 1, "--k", ">= 1", min(args.k))
    check(min(args.temperature) > 0, "--temperature", "> 0", min(args.temperature))
    check(args.batch_size >= 1, "--batch_size", ">= 1", args.batch_size)
    pretrained = load_pretrained(args.pretrained_checkpoint_dir, args.backbone, args.crop_size)
    feature_types = _feature_types(args.feature_type, pretrained)
    data = _data(args, pretrained)
    print(
        f"{pretrained.path}: {data.sizes['test']} test images against {data.sizes['train']} of the bank",
        flush=True,
    )
    train, test = (_extract(pretrained, data, split) for split in ("train", "test"))
    rows = []
    for feature_type in feature_types:
        pair = (train, test)
        if feature_type == "masked":
            pair = tuple(masked_features(split, pretrained.mask) for split in pair)
        rows += _rows(feature_type, *pair, args)
    return rows


def _feature_types(asked: Sequence[str] | None, pretrained: Pretrained) -> list[str]:
    if asked is None:
        return ["backbone"] if pretrained.mask is None else list(FEATURE_TYPES)
    if "projector" in asked:
        raise UserError(
            "--feature_type must be backbone or masked, got 'projector'; "
            "evaluation is on the encoder's features, the projection head is not part of the result"
        )
    for feature_type in asked:
        choose("--feature_type", feature_type, FEATURE_TYPES)
    method = pretrained.args.get("method", "its method")
    missing = "masked" in asked and pretrained.mask is None
    check(not missing, "--feature_type", f"backbone, as {method} has no mask", "masked")
    return list(asked)


def _data(args: argparse.Namespace, pretrained: Pretrained) -> LabelledData:
    given = {
        "dataset": args.dataset,
        "train_path": args.train_data_path,
        "val_path": args.val_data_path,
        "format": args.data_format,
        "fraction": args.data_fraction,
        "num_workers": args.num_workers,
    }
    entry = next(iter(pretrained.args.get("augmentations") or []), {})
    return LabelledData(
        merged_data(pretrained.args, given),
        args.crop_size or entry["crop_size"],
        args.mean or entry.get("mean"),
        args.std or entry.get("std"),
        args.batch_size,
    )


def _extract(pretrained: Pretrained, data: LabelledData, split: str) -> Features:
    loader = data.evaluation_loader(split)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(total=len(loader), desc=f"{split} features", disable=not sys.stderr.isatty()) as bar:
        return extract_features(pretrained.backbone, loader, device, lambda done, total: bar.update())


def _rows(
    feature_type: str, train: Features, test: Features, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    device = "cuda" if torch.cuda.is_available() else None
    for distance in args.distance_function:
        for temperature in args.temperature if distance == "cosine" else [None]:
            settings = {} if temperature is None else {"temperature": temperature}
            found = knn_accuracies(train, test, args.k, distance=distance, device=device, **settings)
            for k, accuracy in found.items():
                rows.append(
                    {
                        "features": feature_type,
                        "distance": distance,
                        "T": None if temperature is None else f"{temperature:g}",
                        "k": k,
                        "acc@1": accuracy.acc1,
                        "acc@5": accuracy.acc5,
                    }
                )
    return rows
