"""What ``main_knn.py`` and ``main_umap.py`` share: solo-learn's flags for a checkpoint and its data."""

import argparse
import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from metamask_plugin.cli.flags import finite, keyword
from metamask_plugin.evaluation.checkpoints import Pretrained, load_pretrained
from metamask_plugin.evaluation.features import Features, extract_features
from metamask_plugin.evaluation.labelled_data import LabelledData, merged_data
from metamask_plugin.host.solo_backbones import solo_factories


def add_input_flags(parser: argparse.ArgumentParser, training: str, test: str) -> None:
    """Adds the flags; what the user leaves out is taken from the checkpoint's args.json.

    Args:
        parser: gets them.
        training: what the training images are for.
        test: what the test images are for.
    """
    add = parser.add_argument
    add("--pretrained_checkpoint_dir", type=Path, required=True, help="a run's folder, or a checkpoint")
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


def pretrained_encoder(args: argparse.Namespace) -> Pretrained:
    """The checkpoint's encoder, of either host."""
    return load_pretrained(
        args.pretrained_checkpoint_dir,
        args.backbone,
        args.crop_size,
        dict(args.backbone_kwargs) if args.backbone_kwargs else None,
        host=args.host,
        solo_factories=solo_factories,
    )


def labelled_data(args: argparse.Namespace, pretrained: Pretrained) -> LabelledData:
    """The images to extract features of."""
    given = {
        "dataset": args.dataset,
        "train_path": args.train_data_path,
        "val_path": args.val_data_path,
        "format": args.data_format,
        "fraction": args.data_fraction,
        "num_workers": args.num_workers,
        "bits": args.bits,
        "evaluation_resize": args.evaluation_resize,
    }
    entry = next(iter(pretrained.args.get("augmentations") or []), {})
    if args.crop_size:
        pretrained.check_side(args.crop_size, "--crop_size")
    return LabelledData(
        merged_data(pretrained.args, given),
        args.crop_size or entry.get("crop_size"),
        args.mean or entry.get("mean"),
        args.std or entry.get("std"),
        args.batch_size,
    )


def features_of(pretrained: Pretrained, loader: DataLoader, split: str) -> Features:
    """Extracts a split's features, on the GPU where there is one, and shows how far it is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tqdm(total=len(loader), desc=f"{split} features", disable=not sys.stderr.isatty()) as bar:
        return extract_features(pretrained.backbone, loader, device, lambda done, total: bar.update())
