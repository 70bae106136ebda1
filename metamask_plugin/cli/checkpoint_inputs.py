"""What ``main_knn.py`` and ``main_umap.py`` share: solo-learn's flags for a checkpoint and its data."""

import argparse

import torch
from torch.utils.data import DataLoader

from metamask_plugin.evaluation.encoder import Encoder
from metamask_plugin.evaluation.features import Features, extract_features
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data
from metamask_plugin.host import load_encoder


def pretrained_encoder(args: argparse.Namespace) -> Encoder:
    """The checkpoint's encoder, of either host."""
    return load_encoder(
        args.pretrained_checkpoint_dir,
        args.backbone,
        args.crop_size,
        dict(args.backbone_kwargs) if args.backbone_kwargs else None,
        host=args.host,
    )


def labelled_data(args: argparse.Namespace, pretrained: Encoder) -> LabelledImages:
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
    entry = pretrained.view
    if args.crop_size:
        pretrained.check_side(args.crop_size, "--crop_size")
    return LabelledImages.read(
        merged_data(pretrained.args, given),
        args.crop_size or entry.get("crop_size"),
        args.mean or entry.get("mean"),
        args.std or entry.get("std"),
        args.batch_size,
    )


def features_of(pretrained: Encoder, loader: DataLoader, split: str) -> Features:
    """Extracts a split's features, on the GPU where there is one, and shows how far it is."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return extract_features(pretrained.backbone, loader, device, f"{split} features")
