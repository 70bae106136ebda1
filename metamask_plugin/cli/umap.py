"""``main_umap.py``: the features of a checkpoint drawn in two dimensions, with solo-learn's flags."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from metamask_plugin.cli.checkpoint_inputs import (
    features_of,
    labelled_data,
    pretrained_encoder,
)
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.parsers import umap as parse_args
from metamask_plugin.cli.paths import made_folder
from metamask_plugin.data.workers import ShieldedLoader
from metamask_plugin.errors import check, choose
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.knn import DISTANCES, masked_features
from metamask_plugin.evaluation.maps import class_maps, embed, require_umap

SPLITS = ("train", "test")


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a map for each split; bad input ends it with one line and exit code 2.

    Args:
        argv: the command line without the program's name; by default the process's.
    """
    args = parse_args(argv)
    with one_line_errors():
        for path in run(args):
            print(path)


def run(args: argparse.Namespace) -> list[Path]:
    """Draws training and test images, their features unmasked and, where there is a mask, masked beside.

    Args:
        args: see :func:`metamask_plugin.cli.parsers.umap`.

    Returns:
        The files written: ``umap_train.png`` and ``umap_test.png``, each followed by its PDF if asked for.

    Raises:
        UserError: for anything that the user can mend.
    """
    _check_flags(args)
    require_umap()
    pretrained = pretrained_encoder(args)
    data = labelled_data(args, pretrained)
    for split, size in data.sizes.items():
        count = min(size, args.limit)
        fits = args.neighbours < count
        check(fits, "--neighbours", f"fewer than the {count} {split} images", args.neighbours)
    output = made_folder("--output_dir", args.output_dir or pretrained.path.parent)
    written = []
    for split in SPLITS:
        loader = drawn_images(data.evaluation_loader(split), args.limit, args.seed)
        count = f"{len(loader.sampler)} of {data.sizes[split]} {split} images"
        print(f"{pretrained.path}: {count}", flush=True)
        features = features_of(pretrained, loader, split)
        positions = _positions(features, pretrained.mask, args)
        figure = class_maps(positions, features.labels, loader.dataset.split.classes, count)
        for suffix in (".png", ".pdf") if args.pdf else (".png",):
            path = output / f"umap_{split}{suffix}"
            save(figure, path)
            written.append(path)
    return written


def drawn_images(loader: DataLoader, limit: int, seed: int) -> DataLoader:
    """The same loader for at most ``limit`` of its images, drawn by ``seed`` and in their old order."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(loader.dataset), generator=generator)[:limit].sort().values
    return ShieldedLoader(
        loader.dataset,
        loader.batch_size,
        sampler=drawn.tolist(),
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        generator=loader.generator,
    )


def _check_flags(args: argparse.Namespace) -> None:
    choose("--distance_function", args.distance_function, DISTANCES)
    check(args.batch_size >= 1, "--batch_size", ">= 1", args.batch_size)
    check(args.neighbours >= 3, "--neighbours", ">= 3", args.neighbours)
    check(args.limit >= 4, "--limit", ">= 4", args.limit)
    check(0 <= args.min_distance <= 1, "--min_distance", "from 0 to 1", args.min_distance)
    check(0 <= args.seed < 2**32, "--seed", "from 0 to 2**32 - 1", args.seed)


def _positions(
    features: Features, mask: torch.Tensor | None, args: argparse.Namespace
) -> dict[str, torch.Tensor]:
    shown = {"unmasked features": features}
    if mask is not None:
        shown["masked features"] = masked_features(features, mask)
    settings = (args.neighbours, args.min_distance, args.distance_function, args.seed)
    return {name: embed(kind.feats, *settings) for name, kind in shown.items()}
