"""``main_linear.py``: a probe on a frozen encoder, or fine-tuning it, with solo-learn's config keys."""

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from metamask_plugin.cli.checked import checked_linear, frozen
from metamask_plugin.cli.dry_run import check_data_kwargs
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.machine import device_type
from metamask_plugin.data.registry import FRACTION_SEED
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.checkpoints import content_digest, find_checkpoint, read_args
from metamask_plugin.evaluation.encoder import Encoder
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.files import replacing
from metamask_plugin.evaluation.finetune import (
    ALL,
    BATCH_SIZE,
    FineTuneProtocol,
    finetune,
    labelled_subset,
    simclr_protocol,
)
from metamask_plugin.evaluation.labelled_images import LabelledImages, merged_data
from metamask_plugin.evaluation.linear import PROTOCOLS, LinearProtocol, ProbeResult, linear_probe
from metamask_plugin.evaluation.report import format_table, write_summary
from metamask_plugin.host import load_encoder

FINETUNE_PROTOCOLS = ("paper", "custom")
"""Values of ``protocol`` with ``finetune=True``; ``paper`` is SimCLR's."""

ELSEWHERE = ("mixup", "cutmix", "label_smoothing", "auto_augment")
"""Settings of solo-learn's ``main_linear.py`` that there are none of here."""


def run(cfg: DictConfig) -> ProbeResult:
    """Trains the probe, prints its accuracies, writes ``args.json``, ``summary.json`` and ``head.pt``.

    They lie in ``<checkpoint.dir>/linear/<name>-<digest>``, where the digest is of the encoder's weights, the
    data and the protocol: the same command replaces its own files, and no other does. With ``finetune=True``
    the encoder is trained, too, on ``data.fraction`` of the labels; the folder is
    ``<checkpoint.dir>/finetune/<name>-<digest>`` then, and the network is in ``finetuned.pt``. Bad input ends
    it with one line and exit code 2.

    Args:
        cfg: the composed config.
    """
    with one_line_errors():
        return _run(cfg)


def _run(cfg: DictConfig) -> ProbeResult:
    cfg = _complete(cfg)
    if cfg.finetune:
        return _finetune(cfg)
    protocol_name, protocol = _protocol(cfg)
    device = torch.device(device_type(cfg.accelerator))
    pretrained = _pretrained(cfg)
    if cfg.masked:
        method = pretrained.args.get("method", "its method")
        check(pretrained.mask is not None, "masked", f"False, as {method} has no mask", True)
    node, view = _data_node(cfg, pretrained)
    listed = node.get("subset_file")
    check(listed is None, "data.subset_file", "left out without finetune=True", listed)
    data = _data(pretrained, node, view)
    print(
        f"{pretrained.path}: {cfg.head} head, protocol {protocol_name}, {protocol.epochs} epochs, "
        f"{data.sizes['train']} training and {data.sizes['test']} test images",
        flush=True,
    )
    train, test = (
        extract_features(pretrained.backbone, data.evaluation_loader(split), device, f"{split} features")
        for split in ("train", "test")
    )
    mask = pretrained.mask if cfg.masked else None
    result = linear_probe(train, test, data.num_classes, protocol, cfg.head, cfg.seed, device, mask)
    row = {
        "features": "masked" if cfg.masked else "backbone",
        "dim": train.feats.shape[1],
        "head": cfg.head,
        "protocol": protocol_name,
        "acc@1": result.acc1_last,
        "acc@5": result.acc5_last,
        "best acc@1": result.acc1_best,
    }
    settings = {"best_epoch": result.best_epoch, "protocol_settings": vars(protocol)}
    head = {"state_dict": result.state_dict, "head": cfg.head}
    _report("linear/head.pt", cfg, pretrained, [node, view, vars(protocol)], head, row, settings)
    return result


def _finetune(cfg: DictConfig) -> ProbeResult:
    for key, expected in (("masked", False), ("head", "linear")):
        check(cfg[key] == expected, key, f"{expected} with finetune=True", cfg[key])
    device = torch.device(device_type(cfg.accelerator))
    pretrained = _pretrained(cfg)
    node, view = _data_node(cfg, pretrained)
    # the few labels are chosen here, from all images, where their seed is free and a list of them is known
    choice = {
        "fraction": node.pop("fraction", ALL),
        "subset_seed": node.pop("subset_seed", FRACTION_SEED),
        "subset_file": node.pop("subset_file", None),
    }
    data = _data(pretrained, node, view)
    images, of = len(labelled_subset(data.images("train"), **choice)), data.sizes["train"]
    share = images / of if choice["subset_file"] else choice["fraction"]
    protocol_name, protocol = _finetune_protocol(cfg, share)
    print(
        f"{pretrained.path}: fine-tuning, protocol {protocol_name}, {protocol.epochs} epochs, {images} of "
        f"{of} training images and {data.sizes['test']} test images",
        flush=True,
    )
    settings = {"protocol": protocol, "seed": cfg.seed, "device": device, "bar": "epochs"}
    result = finetune(pretrained.backbone, data, **settings, **choice)
    row = {
        "features": "fine-tuned",
        "images": images,
        "protocol": protocol_name,
        "acc@1": result.acc1_last,
        "acc@5": result.acc5_last,
        "best acc@1": result.acc1_best,
        "best acc@5": result.acc5_best,
    }
    settings = {"best_epoch": result.best_epoch, "steps": result.steps}
    settings["curve"] = [acc1 for acc1, _ in result.accuracies]
    settings["protocol_settings"] = vars(protocol)
    decisive, network = [node, view, choice, vars(protocol)], {"state_dict": result.state_dict}
    _report("finetune/finetuned.pt", cfg, pretrained, decisive, network, row, {**choice, **settings})
    return result


def _complete(cfg: DictConfig) -> DictConfig:
    """The config, checked, complete and frozen; refuses what is not there."""
    cfg = frozen(checked_linear(cfg))
    if cfg.data.dataset is not None:
        check_data_kwargs(cfg.data.dataset, cfg.data.kwargs or {})
    for key in ELSEWHERE:
        if cfg.get(key):
            raise UserError(
                f"{key} must be off here, got {cfg[key]!r}: this evaluator has crops, flips and plain labels "
                "alone; solo-learn's own main_linear.py reads our checkpoints and does it"
            )
    if cfg.wandb.enabled:
        print("note: wandb.enabled is ignored: the probe's numbers are in summary.json", file=sys.stderr)
    return cfg


def _protocol(cfg: DictConfig) -> tuple[str, LinearProtocol]:
    """The protocol that ``protocol`` names, or the one that the optimizer and scheduler blocks spell out.

    As in solo-learn the learning rate of the optimizer block is that of a batch of 256.
    """
    given = OmegaConf.select(cfg, "optimizer.name") is not None
    name = cfg.protocol or ("custom" if given else "paper")
    return name, PROTOCOLS[name] if name != "custom" else LinearProtocol(**_optimizer_block(cfg))


def _finetune_protocol(cfg: DictConfig, fraction: float) -> tuple[str, FineTuneProtocol]:
    """SimCLR's for ``protocol=paper``, at the optimizer block's batch size, if it is given; or that block.

    How small a crop may be and whether it is flipped is read from ``data.augmentations``, where it is given.
    """
    given = OmegaConf.select(cfg, "optimizer.name") is not None
    name = choose("protocol", cfg.get("protocol") or ("custom" if given else "paper"), FINETUNE_PROTOCOLS)
    view = {}
    for key, path in (("crop_min_scale", "rrc.crop_min_scale"), ("horizontal_flip", "horizontal_flip.prob")):
        value = OmegaConf.select(cfg, f"data.augmentations.{path}")
        if value is not None:
            view[key] = value
    if name == "custom":
        nesterov = cfg.optimizer.kwargs.nesterov
        return name, FineTuneProtocol(**_optimizer_block(cfg), nesterov=nesterov, **view)
    return name, simclr_protocol(fraction, cfg.optimizer.batch_size or BATCH_SIZE, **view)


def _optimizer_block(cfg: DictConfig) -> dict[str, Any]:
    """What the optimizer and scheduler blocks say, as a protocol's settings."""
    for key in ("lr", "batch_size"):
        given = cfg.optimizer[key]
        check(given is not None, f"optimizer.{key}", "set", None, "set it in the YAML, or protocol=paper")
    return {
        "optimizer": cfg.optimizer.get("name"),
        "lr": cfg.optimizer.lr * cfg.optimizer.batch_size / 256,
        "epochs": cfg.max_epochs,
        "batch_size": cfg.optimizer.batch_size,
        "weight_decay": cfg.optimizer.weight_decay,
        "momentum": cfg.optimizer.kwargs.momentum,
        "scheduler": cfg.scheduler.name,
        "lr_end": cfg.scheduler.min_lr,
        "lr_decay_steps": tuple(cfg.scheduler.lr_decay_steps),
    }


def _pretrained(cfg: DictConfig) -> Encoder:
    path = cfg.get("pretrained_feature_extractor")
    remedy = "add pretrained_feature_extractor=RUN/last.ckpt to the command"
    check(path is not None, "pretrained_feature_extractor", "a checkpoint or a run's folder", path, remedy)
    trained = read_args(find_checkpoint(path))
    kwargs = OmegaConf.select(cfg, "backbone.kwargs")
    return load_encoder(
        path,
        OmegaConf.select(cfg, "backbone.name"),
        # with args.json the encoder is built for the images it was trained on, whatever it is tested on
        None if trained.get("augmentations") else OmegaConf.select(cfg, "data.augmentations.crop_size"),
        OmegaConf.to_container(kwargs, resolve=True) if kwargs else None,
        host=cfg.get("host"),
        method=None if trained.get("method") else cfg.get("pretrain_method"),
    )


def _data_node(cfg: DictConfig, pretrained: Encoder) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is tested on, and how its images look: the config's, over what the encoder was trained on."""
    given = {key: value for key, value in OmegaConf.to_container(cfg.data).items() if value is not None}
    view = {**pretrained.view, **(given.pop("augmentations", None) or {})}
    return merged_data(pretrained.args, given), view


def _data(pretrained: Encoder, node: dict[str, Any], view: dict[str, Any]) -> LabelledImages:
    crop_size = view.get("crop_size")
    check(
        isinstance(crop_size, int) and crop_size >= 1,
        "data.augmentations.crop_size",
        "an integer >= 1",
        crop_size,
    )
    pretrained.check_side(crop_size, "data.augmentations.crop_size")
    return LabelledImages.read(node, crop_size, view.get("mean"), view.get("std"))


def _report(
    file: str,
    cfg: DictConfig,
    encoder: Encoder,
    decisive: Sequence[Any],
    weights: dict[str, Any],
    row: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Prints the row, and writes weights, config and results.

    There is a folder for each encoder and protocol: what decides the numbers is in its digest.
    """
    print(format_table([row]))
    if not cfg.checkpoint.enabled:
        return
    decisive = [content_digest(encoder.path), cfg.head, cfg.masked, cfg.seed, *decisive]
    digest = hashlib.sha256(json.dumps(decisive, sort_keys=True, default=str).encode()).hexdigest()[:8]
    kind, _, name = file.partition("/")
    folder = Path(cfg.checkpoint.dir) / kind / f"{cfg.name}-{digest}"
    made = io.BytesIO()  # in memory first, as torch hides a full disk
    torch.save(weights, made)
    with replacing(folder / name) as target:
        target.write(made.getbuffer())
    write_summary(folder / "args.json", OmegaConf.to_container(cfg, resolve=True))
    origin = {"checkpoint": encoder.path, "pretrain_method": encoder.args.get("method"), "seed": cfg.seed}
    write_summary(folder / "summary.json", {**row, **settings, **origin})
    print(f"written to {folder}")
