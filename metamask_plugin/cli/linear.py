"""``main_linear.py``: a linear or MLP probe on a frozen encoder, with solo-learn's config keys."""

import sys
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.checkpoints import Pretrained, find_checkpoint, load_pretrained, read_args
from metamask_plugin.evaluation.features import Features, extract_features
from metamask_plugin.evaluation.labelled_data import LabelledData, merged_data
from metamask_plugin.evaluation.linear import HEADS, PROTOCOLS, LinearProtocol, LinearResult, linear_probe
from metamask_plugin.evaluation.report import format_table, write_summary
from metamask_plugin.host.solo_backbones import solo_factories

DEFAULTS: dict[str, Any] = {
    "name": "linear",
    "seed": 5,
    "head": "linear",
    "masked": False,
    "accelerator": "auto",
    "checkpoint.enabled": True,
    "checkpoint.dir": "trained_models",
    "optimizer.weight_decay": 0.0,
    "optimizer.kwargs.momentum": 0.9,
    "scheduler.name": "none",
    "scheduler.min_lr": 0.0,
    "scheduler.lr_decay_steps": [],
    "max_epochs": 100,
}
"""Used where the config is silent."""

NEEDS_THE_ENCODER = ("finetune", "mixup", "cutmix", "label_smoothing", "auto_augment")
"""Settings of solo-learn's ``main_linear.py`` that go beyond a probe on fixed features."""


def run(cfg: DictConfig) -> LinearResult:
    """Trains the probe, prints its accuracies, writes ``args.json``, ``summary.json`` and ``head.pt``.

    They lie in ``<checkpoint.dir>/linear/<name>``; another run of that name replaces them. Bad input
    ends it with one line and exit code 2.

    Args:
        cfg: the composed config.
    """
    with one_line_errors():
        check(len(cfg) > 0, "--config-name", f"one of {', '.join(shipped_configs())}", None)
        return _run(cfg)


def shipped_configs() -> list[str]:
    """Names of the linear configs."""
    root = SCRIPTS / "linear"
    return sorted(str(path.relative_to(root).with_suffix("")) for path in root.rglob("*.yaml"))


def _run(cfg: DictConfig) -> LinearResult:
    _complete(cfg)
    protocol_name, protocol = _protocol(cfg)
    device = _device(cfg.accelerator)
    pretrained = _pretrained(cfg)
    if cfg.masked:
        method = pretrained.args.get("method", "its method")
        check(pretrained.mask is not None, "masked", f"False, as {method} has no mask", True)
    data = _data(cfg, pretrained)
    print(
        f"{pretrained.path}: {cfg.head} head, protocol {protocol_name}, {protocol.epochs} epochs, "
        f"{data.sizes['train']} training and {data.sizes['test']} test images",
        flush=True,
    )
    train, test = (_extract(pretrained, data, split, device) for split in ("train", "test"))
    mask = pretrained.mask if cfg.masked else None
    result = linear_probe(train, test, data.num_classes, protocol, cfg.head, cfg.seed, device, mask)
    row = {
        "features": "masked" if cfg.masked else "backbone",
        "dim": train.feats.shape[1],
        "head": cfg.head,
        "protocol": protocol_name,
        "acc@1": result.acc1_last,
        "acc@5": result.acc5,
        "best acc@1": result.acc1_best,
    }
    print(format_table([row]))
    if cfg.checkpoint.enabled:
        _write(cfg, pretrained, protocol, row, result)
    return result


def _complete(cfg: DictConfig) -> None:
    """Fills in defaults, in place, and refuses what a probe on fixed features cannot do."""
    OmegaConf.set_struct(cfg, False)
    for key, value in DEFAULTS.items():
        if OmegaConf.select(cfg, key) is None:
            OmegaConf.update(cfg, key, value, force_add=True)
    for key in NEEDS_THE_ENCODER:
        if cfg.get(key):
            raise UserError(
                f"{key} must be off here, got {cfg[key]!r}: this evaluator trains linear and MLP probes on "
                "frozen features; solo-learn's own main_linear.py reads our checkpoints and does it"
            )
    if OmegaConf.select(cfg, "wandb.enabled"):
        print("wandb.enabled is ignored: the probe's numbers are in summary.json", file=sys.stderr)
    choose("head", cfg.head, HEADS)
    check(isinstance(cfg.masked, bool), "masked", "True or False", cfg.masked)
    check(isinstance(cfg.seed, int), "seed", "an integer", cfg.seed)


def _protocol(cfg: DictConfig) -> tuple[str, LinearProtocol]:
    """The protocol that ``protocol`` names, or the one that the optimizer and scheduler blocks spell out.

    As in solo-learn the learning rate of the optimizer block is that of a batch of 256.
    """
    given = OmegaConf.select(cfg, "optimizer.name") is not None
    name = choose("protocol", cfg.get("protocol") or ("custom" if given else "paper"), [*PROTOCOLS, "custom"])
    if name != "custom":
        return name, PROTOCOLS[name]
    remedy = "set it in the YAML, or protocol=paper"
    for key, kind in (("lr", float), ("batch_size", int), ("weight_decay", float)):
        value = cfg.optimizer.get(key)
        accepted = (int, float) if kind is float else int
        check(
            isinstance(value, accepted),
            f"optimizer.{key}",
            f"a{'n' * (kind is int)} {kind.__name__}",
            value,
            remedy,
        )
    check(isinstance(cfg.max_epochs, int), "max_epochs", "an integer", cfg.max_epochs)
    return name, LinearProtocol(
        optimizer=cfg.optimizer.get("name"),
        lr=cfg.optimizer.lr * cfg.optimizer.batch_size / 256,
        epochs=cfg.max_epochs,
        batch_size=cfg.optimizer.batch_size,
        weight_decay=cfg.optimizer.weight_decay,
        momentum=cfg.optimizer.kwargs.momentum,
        scheduler=cfg.scheduler.name,
        lr_end=cfg.scheduler.min_lr,
        lr_decay_steps=tuple(cfg.scheduler.lr_decay_steps),
    )


def _device(accelerator: str) -> torch.device:
    choose("accelerator", accelerator, ("auto", "cpu", "cuda", "gpu"))
    if accelerator in ("gpu", "cuda"):
        found = torch.cuda.is_available()
        check(found, "accelerator", "auto or cpu where no GPU is found", accelerator, "set accelerator=cpu")
    return torch.device("cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu")


def _pretrained(cfg: DictConfig) -> Pretrained:
    path = cfg.get("pretrained_feature_extractor")
    # solo-learn's YAMLs write None, which YAML reads as a word
    given = path not in (None, "None", "")
    remedy = "add pretrained_feature_extractor=RUN/last.ckpt to the command"
    check(given, "pretrained_feature_extractor", "a checkpoint or a run's folder", path, remedy)
    trained = read_args(find_checkpoint(path))
    kwargs = OmegaConf.select(cfg, "backbone.kwargs")
    return load_pretrained(
        path,
        OmegaConf.select(cfg, "backbone.name"),
        # with args.json the encoder is built for the images it was trained on, whatever it is tested on
        None if trained.get("augmentations") else OmegaConf.select(cfg, "data.augmentations.crop_size"),
        OmegaConf.to_container(kwargs, resolve=True) if kwargs else None,
        host=cfg.get("host"),
        method=None if trained.get("method") else cfg.get("pretrain_method"),
        solo_factories=solo_factories,
    )


def _data(cfg: DictConfig, pretrained: Pretrained) -> LabelledData:
    given = OmegaConf.to_container(cfg.get("data") or OmegaConf.create({}), resolve=True)
    trained = next(iter(pretrained.args.get("augmentations") or []), {})
    view = {**trained, **(given.pop("augmentations", None) or {})}
    crop_size = view.get("crop_size")
    check(
        isinstance(crop_size, int) and crop_size >= 1,
        "data.augmentations.crop_size",
        "an integer >= 1",
        crop_size,
    )
    data = merged_data(pretrained.args, given)
    return LabelledData(data, crop_size, view.get("mean"), view.get("std"))


def _extract(pretrained: Pretrained, data: LabelledData, split: str, device: torch.device) -> Features:
    loader = data.evaluation_loader(split)
    with tqdm(total=len(loader), desc=f"{split} features", disable=not sys.stderr.isatty()) as bar:
        return extract_features(pretrained.backbone, loader, device, lambda done, total: bar.update())


def _write(
    cfg: DictConfig,
    pretrained: Pretrained,
    protocol: LinearProtocol,
    row: dict[str, Any],
    result: LinearResult,
) -> None:
    folder = Path(cfg.checkpoint.dir) / "linear" / cfg.name
    write_summary(folder / "args.json", OmegaConf.to_container(cfg, resolve=True))
    summary = {
        **row,
        "best_epoch": result.best_epoch,
        "checkpoint": pretrained.path,
        "pretrain_method": pretrained.args.get("method"),
        "protocol_settings": vars(protocol),
        "seed": cfg.seed,
    }
    write_summary(folder / "summary.json", summary)
    torch.save({"state_dict": result.state_dict, "head": cfg.head}, folder / "head.pt")
    print(f"written to {folder}")
