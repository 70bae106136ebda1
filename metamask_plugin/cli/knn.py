"""``main_knn.py``: nearest-neighbour accuracy of a checkpoint, with solo-learn's flags."""

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from metamask_plugin.cli.checkpoint_inputs import (
    features_of,
    labelled_data,
    pretrained_encoder,
)
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.parsers import knn as parse_args
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.encoder import Encoder
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.knn import (
    DISTANCES,
    knn_accuracies,
    masked_features,
    vote_temperature,
    within_bank,
)
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


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Evaluates every combination of feature type, distance, temperature and k.

    Args:
        args: see :func:`metamask_plugin.cli.parsers.knn`.

    Returns:
        One row a combination, accuracies in percent.

    Raises:
        UserError: for anything that the user can mend.
    """
    for distance in args.distance_function:
        choose("--distance_function", distance, DISTANCES)
    check(min(args.k) >= 1, "--k", ">= 1", min(args.k))
    lowest = min(args.temperature or [1])
    check(lowest > 0, "--temperature", "> 0", lowest)
    check(args.batch_size >= 1, "--batch_size", ">= 1", args.batch_size)
    pretrained = pretrained_encoder(args)
    feature_types = _feature_types(args.feature_type, pretrained)
    data = labelled_data(args, pretrained)
    print(
        f"{pretrained.path}: {data.sizes['test']} test images against {data.sizes['train']} of the bank",
        flush=True,
    )
    args.k = within_bank("--k", args.k, data.sizes["train"])
    loaders = {split: data.evaluation_loader(split) for split in ("train", "test")}
    train, test = (features_of(pretrained, loader, split) for split, loader in loaders.items())
    rows = []
    for feature_type in feature_types:
        pair = (train, test)
        if feature_type == "masked":
            pair = tuple(masked_features(split, pretrained.mask) for split in pair)
        rows += _rows(feature_type, *pair, args)
    return rows


def _feature_types(asked: Sequence[str] | None, pretrained: Encoder) -> list[str]:
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


def _rows(
    feature_type: str, train: Features, test: Features, args: argparse.Namespace
) -> list[dict[str, Any]]:
    rows = []
    device = "cuda" if torch.cuda.is_available() else None
    for distance in args.distance_function:
        cosine = distance == "cosine"
        for temperature in args.temperature or [None] if cosine else [None]:
            found = knn_accuracies(train, test, args.k, temperature, distance, device)
            for k, accuracy in found.items():
                rows.append(
                    {
                        "features": feature_type,
                        "distance": distance,
                        "T": f"{vote_temperature(k, temperature):g}" if cosine else None,
                        "k": k,
                        "acc@1": accuracy.acc1,
                        "acc@5": accuracy.acc5,
                    }
                )
    return rows
