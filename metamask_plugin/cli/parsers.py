"""Flags of the commands that take no config. Nothing heavy is imported here: a slip is told at once."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from metamask_plugin.cli.flags import FlagParser, finite, keyword, there


def knn(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """solo-learn's flags of ``main_knn.py``; what is left out is taken from the checkpoint's args.json."""
    parser = FlagParser(
        "knn", "Evaluates a checkpoint by nearest neighbours; what is left out is taken from its args.json."
    )
    _add_inputs(parser, "images of the memory bank", "images to classify")
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=[5, 20, 200], help="numbers of neighbours")
    add(
        "--temperature",
        type=finite,
        nargs="+",
        help="of the votes, cosine only; by default 1 for k = 5 and 0.07 for any other",
    )
    add("--distance_function", nargs="+", default=["cosine"], help="cosine, euclidean")
    add("--feature_type", nargs="+", help="backbone, masked; by default all that there are")
    return parser.parse_args(argv)


def umap(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """solo-learn's flags of ``main_umap.py``; what is left out is taken from the checkpoint's args.json."""
    parser = FlagParser(
        "umap",
        "Draws a checkpoint's features in two dimensions; what is left out is taken from its args.json.",
    )
    _add_inputs(parser, "images of the first map", "images of the second map")
    add = parser.add_argument
    add("--limit", type=int, default=5000, help="images a map, drawn at random where there are more")
    add("--neighbours", type=int, default=15, help="of an image in UMAP: few show detail, many the whole")
    add("--min_distance", type=finite, default=0.1, help="of two points in UMAP, from 0 to 1")
    add("--distance_function", default="cosine", help="between features: cosine, euclidean")
    add("--seed", type=int, default=5, help="of the images that are drawn, and of UMAP")
    add("--output_dir", type=Path, help="folder of the pictures; by default the checkpoint's")
    add("--pdf", action="store_true", help="write PDF files, too")
    return parser.parse_args(argv)


def foreground(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Flags named as those of ``main_knn.py``; what is left out is taken from each run's args.json."""
    parser = FlagParser(
        "foreground", "Tests checkpoints on full images, foregrounds and backgrounds, as in ICL-MSR's Fig. 1."
    )
    add = parser.add_argument
    add(
        "--pretrained_checkpoint_dir",
        type=there,
        nargs="+",
        required=True,
        help="runs, or checkpoints",
    )
    add("--names", nargs="+", help="one a run; by default as in args.json. Seeds of one name are averaged")
    add("--fit_on", default="trained", help="training images of the region trained on, or of the one tested")
    add("--form", help="fill or zoom for foregrounds; by default as the runs were trained, else fill")
    add("--k", type=int, default=5, help="number of neighbours")
    add("--protocol", default="paper", help="of the linear probe: paper, solo, fast, none")
    add("--dataset", help="by default the one they were trained on, as for the paths")
    add("--train_data_path", help="images that the classifiers learn from")
    add("--val_data_path", help="images to classify")
    add("--num_workers", type=int, help="processes that decode image files")
    add("--batch_size", type=int, default=256, help="images run through the encoder at once")
    add("--output", type=Path, help="folder of the results; by default the run's, for several ./foreground")
    return parser.parse_args(argv)


def verify(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Folders of images to be looked at."""
    parser = FlagParser(
        "verify", "Lists the images below some folders that cannot be read, a line each with the reason."
    )
    parser.add_argument("folders", nargs="+", type=there, metavar="folder", help="with images at any depth")
    parser.add_argument("--decode", action="store_true", help="decode every image whole")
    return parser.parse_args(argv)


def listing(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Sections of what can be named."""
    parser = FlagParser("list", "Lists what a command line can name.")
    parser.add_argument("section", nargs="?", choices=SECTIONS, help="all by default")
    return parser.parse_args(argv)


SECTIONS = (
    *("configs", "tasks", "methods", "encoders", "datasets", "estimators", "ablations", "settings"),
    "studies",
)


def _add_inputs(parser: argparse.ArgumentParser, training: str, test: str) -> None:
    """Adds the flags; what the user leaves out is taken from the checkpoint's args.json.

    Args:
        parser: gets them.
        training: what the training images are for.
        test: what the test images are for.
    """
    add = parser.add_argument
    add("--pretrained_checkpoint_dir", type=there, required=True, help="a run's folder, or a checkpoint")
    add("--dataset", help="by default the one it was trained on, as for the paths")
    add("--train_data_path", help=training)
    add("--val_data_path", help=test)
    add("--data_format", help="image_folder or dali, which are read alike")
    add("--data_fraction", type=finite, help="share of the training images to use, -1 for all")
    add("--mean", type=finite, nargs=3, help="per channel, for custom data")
    add("--std", type=finite, nargs=3, help="per channel, for custom data")
    add("--bits", type=int, help="bits that 16-bit grey uses; by default as in training")
    add("--evaluation_resize", type=int, help="shorter side before the centre crop, in pixels; likewise")
    add("--batch_size", type=int, default=256, help="images run through the encoder at once")
    add("--num_workers", type=int, help="processes that decode image files")
    add("--backbone", help="the encoder, where no args.json names it")
    add(
        "--backbone_kwargs", type=keyword, nargs="+", metavar="KEY=VALUE", help="its options, e.g. stem=cifar"
    )
    add("--crop_size", type=int, help="side of the images in pixels, where no args.json gives it")
    add("--host", help="solo or embedded: who built the encoder, where no args.json says it")
