"""``main_pretrain.py``: from a config to a trained, evaluated and pictured encoder."""

import copy
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin import SCRIPTS
from metamask_plugin.cli.config import complete, device_count, on_cpu, with_own_task_settings
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.data import PretrainDataModule, load_dataset
from metamask_plugin.data.batches import EpochPosition
from metamask_plugin.data.worker_failure import worker_failures
from metamask_plugin.errors import UserError, check, choose
from metamask_plugin.evaluation.knn import within_bank
from metamask_plugin.evaluation.report import write_summary
from metamask_plugin.methods import METHODS
from metamask_plugin.training.checkpoint_io import WholeCheckpointIO
from metamask_plugin.training.checkpointer import Checkpointer
from metamask_plugin.training.data_wait import DataWait
from metamask_plugin.training.epoch_means import EpochMeans
from metamask_plugin.training.evaluation_data import EvaluationData
from metamask_plugin.training.final_report import final_report
from metamask_plugin.training.history import History
from metamask_plugin.training.nonfinite_report import NonFiniteReport
from metamask_plugin.training.online_knn import OnlineKNN
from metamask_plugin.training.preemption import Preempted, Preemption
from metamask_plugin.training.process_group import with_timeout
from metamask_plugin.training.progress import Progress
from metamask_plugin.training.rank_failure import watched_ranks
from metamask_plugin.training.resume import asked_for, resumable
from metamask_plugin.training.run_folder import RunFolder, experiment_of
from metamask_plugin.training.torch_flags import torch_flags_kept

TRAINER_KEYS = (
    "accelerator",
    "accumulate_grad_batches",
    "benchmark",
    "deterministic",
    "devices",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "max_epochs",
    "max_steps",
    "num_nodes",
    "precision",
    "strategy",
    "sync_batchnorm",
)
"""Config keys handed to Lightning's Trainer as they are."""


def run(cfg: DictConfig) -> RunFolder:
    """Pretrains, evaluates and reports; bad input ends it with one line and exit code 2.

    Args:
        cfg: the composed config.

    Returns:
        The run's folder.
    """
    with one_line_errors(), worker_failures(), torch_flags_kept():
        check(len(cfg) > 0, "--config-name", f"one of {', '.join(shipped_configs())}", None)
        return pretrain(complete(with_own_task_settings(cfg)))


def shipped_configs() -> list[str]:
    """Names of the pretraining configs."""
    root = SCRIPTS / "pretrain"
    found = [*root.glob("*.yaml"), *root.glob("*/metamask_*.yaml"), *root.glob("*/icl_msr_*.yaml")]
    names = (path.relative_to(root).with_suffix("").as_posix() for path in found)
    return sorted(name for name in names if not name.startswith("setting/"))


def pretrain(cfg: DictConfig) -> RunFolder:
    """Pretrains, evaluates and reports.

    Args:
        cfg: a complete config, see :func:`~metamask_plugin.cli.config.complete`.

    Returns:
        The run's folder.

    Raises:
        UserError: for bad input.
    """
    _quiet()
    choose("method", cfg.method, METHODS)
    dataset = load_dataset(cfg.data)
    cfg.data.num_classes = dataset.num_classes
    pl.seed_everything(cfg.seed, workers=True)
    # the experiment is what the user asked for, before the method fills in its own defaults
    resuming = cfg.auto_resume.enabled or cfg.resume_from_checkpoint is not None
    folder, identity = RunFolder(cfg, resume=resuming), experiment_of(cfg)
    reported = cfg.evaluation.enabled and cfg.evaluation.final_report
    if cfg.auto_resume.enabled and folder.is_complete(reported):
        print(f"This run is complete: {folder.path}")
        if folder.summary.exists():
            print((folder.path / "table.txt").read_text(), end="")
        print("Train it anew with auto_resume.enabled=False.")
        return folder

    datamodule = PretrainDataModule(dataset, cfg)
    datamodule.setup("fit")  # what cannot be is found before a run folder is made
    identity["data"]["images_fingerprint"] = datamodule.full.fingerprint()
    model = METHODS[cfg.method](cfg)
    if not model.no_channel_last:  # the images are laid out so, and convolutions want their weights alike
        model = model.to(memory_format=torch.channels_last)
    initial = copy.deepcopy(model)

    evaluation = EvaluationData(datamodule)
    if evaluation.available:
        cfg.evaluation.knn.k = within_bank("evaluation.knn.k", cfg.evaluation.knn.k, evaluation.bank)
    callbacks = _callbacks(cfg, folder, evaluation, datamodule.position, identity)
    trainer = _trainer(cfg, folder, callbacks)
    checkpoint = _resume_from(cfg, folder, model, identity)
    folder.write_args(cfg, datamodule.dataset.skipped)
    if trainer.is_global_zero:
        _announce(cfg, folder, model, checkpoint)

    started = time.monotonic()
    with watched_ranks(trainer, lambda: _way_on(folder)):
        _fit(trainer, model, datamodule, checkpoint, folder)
    seconds = time.monotonic() - started
    if trainer.is_global_zero and not folder.finished.exists():
        write_summary(folder.finished, {"epochs": trainer.current_epoch, "seconds": round(seconds, 1)})
    if trainer.is_global_zero and reported and evaluation.available:
        device = trainer.strategy.root_device
        final_report(cfg, folder, evaluation, initial, model, callbacks["history"], seconds, device)
    return folder


def _quiet() -> None:
    """Leaves the terminal to the run: Lightning's banners and its advice about workers say nothing here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`torch.jit.script` is deprecated.*")


def _callbacks(
    cfg: DictConfig,
    folder: RunFolder,
    data: EvaluationData,
    position: EpochPosition,
    identity: dict[str, Any],
) -> dict[str, pl.Callback]:
    """In the order in which they must run: measure, record, show, save."""
    callbacks: dict[str, pl.Callback] = {"epoch_means": EpochMeans(), "data_wait": DataWait()}
    if cfg.evaluation.enabled and data.available:
        knn = cfg.evaluation.knn
        callbacks["knn"] = OnlineKNN(data, knn.k, knn.every_n_epochs, knn.temperature)
    callbacks["history"] = History(folder, callbacks.get("knn"))
    callbacks["progress"] = Progress()
    callbacks["nonfinite"] = NonFiniteReport(folder)
    if cfg.checkpoint.enabled:
        callbacks["preemption"] = Preemption()
        callbacks["checkpointer"] = Checkpointer(
            folder,
            cfg.checkpoint.frequency,
            f"knn{cfg.evaluation.knn.k[0]}" if "knn" in callbacks else None,
            position,
            callbacks["preemption"],
            cfg.checkpoint.get("every_n_steps"),
            identity,
        )
    return callbacks


def _trainer(cfg: DictConfig, folder: RunFolder, callbacks: dict[str, pl.Callback]) -> pl.Trainer:
    kwargs = {key: cfg[key] for key in TRAINER_KEYS if cfg.get(key) is not None}
    if device_count(cfg) * cfg.num_nodes > 1:
        kwargs["strategy"] = with_timeout(cfg.strategy, OmegaConf.select(cfg, "process_timeout"))
    if OmegaConf.is_list(cfg.devices):
        kwargs["devices"] = list(cfg.devices)
    if on_cpu(cfg):  # configs written for one GPU name it; the CPU only has a count
        kwargs["devices"] = device_count(cfg)
    try:
        return pl.Trainer(
            **kwargs,
            callbacks=list(callbacks.values()),
            plugins=[WholeCheckpointIO()],
            profiler=callbacks["data_wait"].clock,
            logger=_loggers(cfg, folder),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            log_every_n_steps=1,
        )
    except (ValueError, TypeError, RuntimeError, ImportError, MisconfigurationException) as error:
        raise UserError(
            f"accelerator={cfg.accelerator!r}, devices={cfg.devices!r}, precision={cfg.precision!r}, "
            f"strategy={cfg.strategy!r} cannot be used on this machine: {error}"
        ) from error


def _loggers(cfg: DictConfig, folder: RunFolder) -> list[Logger]:
    loggers: list[Logger] = [TensorBoardLogger(folder.path, name="", version="tensorboard")]
    if cfg.wandb.enabled:
        try:
            from lightning.pytorch.loggers import WandbLogger

            wandb_logger = WandbLogger(
                name=cfg.name,
                project=cfg.wandb.project,
                entity=cfg.wandb.entity,
                offline=cfg.wandb.offline,
                save_dir=folder.path,
            )
        except ImportError as error:
            raise UserError(
                "wandb.enabled must be False where wandb is missing; pip install wandb"
            ) from error
        wandb_logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        loggers.append(wandb_logger)
    return loggers


def _resume_from(
    cfg: DictConfig, folder: RunFolder, model: nn.Module, identity: dict[str, Any]
) -> Path | None:
    """The checkpoint to go on from, checked before anything starts."""
    if cfg.resume_from_checkpoint is not None:
        return asked_for(Path(cfg.resume_from_checkpoint), model, identity)
    return resumable(folder, model, identity) if cfg.auto_resume.enabled else None


def _announce(cfg: DictConfig, folder: RunFolder, model: nn.Module, checkpoint: Path | None) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    device = "CPU" if on_cpu(cfg) else f"{device_count(cfg)} x {torch.cuda.get_device_name()}"
    print(
        f"{cfg.method} on {cfg.data.dataset}: {cfg.backbone.name}, {parameters / 1e6:.2f} M parameters, "
        f"{cfg.max_epochs} epochs of batch {cfg.optimizer.batch_size}, {device}\n"
        f"{'resuming ' + str(checkpoint) if checkpoint else 'run folder'} {folder.path}",
        flush=True,
    )


def _fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: PretrainDataModule,
    checkpoint: Path | None,
    folder: RunFolder,
) -> None:
    """Trains; an interruption ends with where to go on from, not with a traceback."""
    kwargs = {"ckpt_path": None if checkpoint is None else str(checkpoint)}
    try:
        trainer.fit(model, datamodule=data, **kwargs)
    except Preempted as preempted:
        where = f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}"
        print(f"{preempted.signal.name} in {where}; {_way_on(folder)}")
        raise SystemExit(128 + preempted.signal) from None
    except KeyboardInterrupt:
        pass
    except SystemExit:
        if not trainer.interrupted:
            raise
    if not trainer.state.finished:
        print(f"interrupted in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}; {_way_on(folder)}")
        raise SystemExit(130)


def _way_on(folder: RunFolder) -> str:
    """How an interrupted run is gone on with."""
    saved = folder.last_checkpoint
    if saved.exists():
        return f"resume with resume_from_checkpoint={saved}"
    return "no epoch was finished, nothing is saved"
