"""A trained method of this package, and batches of its own images, from a run folder."""

from pathlib import Path

import lightning.pytorch as pl
import torch
from omegaconf import OmegaConf

from metamask_plugin.data import PretrainDataModule, load_dataset
from metamask_plugin.evaluation.checkpoints import find_checkpoint, read_args
from metamask_plugin.methods import METHODS


def load_method(path: str | Path, batch: int) -> tuple[pl.LightningModule, PretrainDataModule]:
    """The whole method of a checkpoint, heads and mask included, and its data in batches of ``batch``.

    Args:
        path: a run folder of ours, or a checkpoint in one.
        batch: images in a batch.

    Raises:
        ValueError: if the checkpoint's weights are not the method's.
    """
    checkpoint = find_checkpoint(path)
    cfg = OmegaConf.create(read_args(checkpoint))
    cfg.optimizer.batch_size = batch
    cfg.data.num_workers = 0
    model = METHODS[cfg.method](cfg)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    # an older run may lack a buffer, an empty queue say; it must not lack a weight
    lacking = [*unexpected, *(name for name in missing if name in dict(model.named_parameters()))]
    if lacking:
        raise ValueError(f"{checkpoint} must hold the weights of {cfg.method}, and no others: {lacking}")
    return model, PretrainDataModule(load_dataset(cfg.data), cfg)


def backbone_name(path: str | Path) -> str:
    """Of the encoder in a checkpoint."""
    return read_args(find_checkpoint(path))["backbone"]["name"]


def two_batches(
    data: PretrainDataModule, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Views of the training's first two batches, which share no image."""
    data.setup("fit")
    found = []
    for batch in data.train_dataloader():
        _, views, _ = data.on_after_batch_transfer(batch, 0)
        found.append([view.to(device) for view in views])
        if len(found) == 2:
            return found[0], found[1]
    raise ValueError(f"two batches of {data.batch_size} images expected, got {len(found)}: lower --batch")
