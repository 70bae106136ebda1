"""``main_pretrain.py``: from a config to a trained, evaluated and pictured encoder."""

import copy
import logging
import os
import secrets
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.cli.checked import changed, check_ablation
from metamask_plugin.cli.config import complete, device_count, for_method, recorded, with_own_task_settings
from metamask_plugin.cli.errors import one_line_errors
from metamask_plugin.cli.machine import device_title, device_type, processes
from metamask_plugin.data import PretrainDataModule, load_dataset
from metamask_plugin.data.workers import worker_failure, worker_failures
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.knn import within_bank
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.methods import METHODS
from metamask_plugin.signals import Preempted
from metamask_plugin.training.callbacks import DataWait, History, NonFiniteReport, OnlineKNN, Progress
from metamask_plugin.training.checkpoints import (
    BestCheckpoint,
    Checkpointer,
    EpochMeans,
    SettingsApply,
    WholeCheckpointIO,
)
from metamask_plugin.training.experiment import experiment_of
from metamask_plugin.training.ranks import RankDraws, SameFolder, watched_ranks, with_timeout
from metamask_plugin.training.report import evaluation_of, final_report
from metamask_plugin.training.resume import Start, adopt_best, checkpoint_for, start_of
from metamask_plugin.training.run_folder import RunFolder, locked

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
        check_ablation(cfg)
        cfg = complete(with_own_task_settings(cfg))
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            # a sweep over max_epochs compares runs of their own
            cfg = changed(cfg, "auto_resume.extend", False)
        return pretrain(cfg)


@contextmanager
def torch_flags_kept() -> Iterator[None]:
    """Restores torch's ``deterministic`` and ``benchmark`` settings of the whole process at its end.

    Lightning's Trainer switches torch's deterministic algorithms on and never off: the next run of a sweep
    would have them, too, and be slower or fail.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, deterministic = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")  # Lightning sets it for cuBLAS
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = benchmark, deterministic
        os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        if workspace is not None:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def pretrain(cfg: DictConfig, wait: bool = False) -> RunFolder:
    """Pretrains, evaluates and reports.

    Args:
        cfg: a complete config, see :func:`~metamask_plugin.cli.config.complete`.
        wait: whether to wait where another process trains this run.

    Returns:
        The run's folder.

    Raises:
        UserError: for bad input.
    """
    _quiet()
    datamodule, model, experiment = prepared(cfg)
    start = start_of(cfg, experiment, model)
    with locked(start.folder.path, "the run folder", wait):
        return _completed(cfg, start, datamodule, model)


def prepared(cfg: DictConfig) -> tuple[PretrainDataModule, pl.LightningModule, dict[str, Any]]:
    """The images, the untrained method, and what defines the run; nothing is written.

    Args:
        cfg: a complete config; it stays as it is.
    """
    dataset = load_dataset(cfg.data)
    pl.seed_everything(cfg.seed, workers=True)
    datamodule = PretrainDataModule(dataset, cfg, processes(cfg))
    datamodule.setup("fit")  # what cannot be is found before a run folder is made
    model = METHODS[cfg.method](for_method(cfg, dataset.num_classes))
    if not model.no_channel_last:  # the images are laid out so, and convolutions want their weights alike
        model = model.to(memory_format=torch.channels_last)
    experiment = experiment_of(
        model.cfg,
        devices=device_count(cfg),
        device=device_type(cfg.accelerator),
        pipeline=datamodule.pipeline,
        images_fingerprint=datamodule.full.fingerprint(),
    )
    return datamodule, model, experiment


def _completed(
    cfg: DictConfig, start: Start, datamodule: PretrainDataModule, model: pl.LightningModule
) -> RunFolder:
    """Does what is left to do of a run: nothing, a report, or a training."""
    folder, data = start.folder, LabelledImages.of_run(datamodule)
    reported = cfg.evaluation.enabled and cfg.evaluation.final_report and data.available
    if cfg.evaluation.enabled and data.available:
        ks = within_bank("evaluation.knn.k", cfg.evaluation.knn.k, data.sizes["train"])
        cfg = changed(cfg, "evaluation.knn.k", ks)
    evaluation = evaluation_of(cfg, data) if reported else None
    if folder.is_complete(cfg.checkpoint.enabled, evaluation):
        print(f"This run is complete: {folder.path}")
        if reported:
            print(folder.table.read_text(), end="")
        print("Train it anew with auto_resume.enabled=False.")
        return folder

    initial = copy.deepcopy(model)
    callbacks = _callbacks(cfg, start, datamodule, data)
    trainer = _trainer(cfg, folder, callbacks)
    checkpoint = checkpoint_for(cfg, start, model)
    if trainer.is_global_zero:
        folder.start(recorded(cfg, model.cfg), datamodule.dataset.skipped, anew=checkpoint is None)
        if checkpoint is not None:
            adopt_best(checkpoint, folder)
        _announce(cfg, folder, model, checkpoint)

    started = time.monotonic()
    with watched_ranks(trainer, lambda: _way_on(folder)):
        _fit(trainer, model, datamodule, checkpoint, folder, callbacks["checkpointer"])
    seconds = time.monotonic() - started
    if trainer.is_global_zero:
        if not folder.is_finished:
            folder.finish(trainer.current_epoch, trainer.global_step, seconds)
        if evaluation is not None:
            device = trainer.strategy.root_device
            model = model.float()  # as an evaluator loads it, whatever the precision of the training
            final_report(cfg, folder, data, initial, model, callbacks["history"], seconds, device)
    return folder


def _quiet() -> None:
    """Leaves the terminal to the run: Lightning's banners and its advice about workers say nothing here."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*`torch.jit.script` is deprecated.*")


def _callbacks(
    cfg: DictConfig, start: Start, datamodule: PretrainDataModule, data: LabelledImages
) -> dict[str, Any]:
    """In the order in which they must run: record, save, measure, show."""
    folder, saved = start.folder, cfg.checkpoint if cfg.checkpoint.enabled else {}
    history = History(folder)
    callbacks = {
        "same_folder": SameFolder(folder),
        "settings": SettingsApply(),
        "epoch_means": EpochMeans(),
        "data_wait": DataWait(),
        "history": history,
        "nonfinite": NonFiniteReport(folder),
        "checkpointer": Checkpointer(
            folder,
            datamodule.position,
            start.experiment,
            saved.get("frequency"),
            saved.get("every_n_steps"),
        ),
        "rank_draws": RankDraws(cfg.seed),
    }
    if cfg.evaluation.enabled and data.available:
        knn = cfg.evaluation.knn
        callbacks["knn"] = OnlineKNN(data, history, knn.k, knn.every_n_epochs, knn.temperature)
        if cfg.checkpoint.enabled:
            callbacks["best"] = BestCheckpoint(folder, callbacks["knn"])
    return callbacks | {"progress": Progress()}


def _trainer(cfg: DictConfig, folder: RunFolder, callbacks: dict[str, Any]) -> pl.Trainer:
    kwargs = {key: cfg[key] for key in TRAINER_KEYS if cfg.get(key) is not None}
    kwargs["accelerator"] = device_type(cfg.accelerator)  # Lightning's auto and gpu may be another one
    if processes(cfg) > 1:
        kwargs["strategy"] = with_timeout(cfg.strategy, OmegaConf.select(cfg, "process_timeout"))
    if OmegaConf.is_list(cfg.devices):
        kwargs["devices"] = list(cfg.devices)
    if kwargs["accelerator"] != "cuda":  # configs written for one GPU name it; others only have a count
        kwargs["devices"] = device_count(cfg)
    loggers = _loggers(cfg, folder)
    try:
        return pl.Trainer(
            **kwargs,
            callbacks=list(callbacks.values()),
            plugins=[WholeCheckpointIO()],
            profiler=callbacks["data_wait"].clock,
            logger=loggers,
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
                id=_wandb_id(folder),
                resume="allow",
            )
        except ImportError as error:
            raise UserError(
                "wandb.enabled must be False where wandb is missing; pip install wandb"
            ) from error
        wandb_logger.log_hyperparams(OmegaConf.to_container(cfg, resolve=True))
        loggers.append(wandb_logger)
    return loggers


@rank_zero_only
def _wandb_id(folder: RunFolder) -> str:
    """What Weights & Biases knows the run by: the same each time that it is resumed."""
    file = folder.path / "wandb_id.txt"
    if not file.exists():
        write_whole(file, secrets.token_hex(4))
    return file.read_text().strip()


def _announce(cfg: DictConfig, folder: RunFolder, model: nn.Module, checkpoint: Path | None) -> None:
    parameters = sum(p.numel() for p in model.parameters())
    print(
        f"{cfg.method} on {cfg.data.dataset}: {cfg.backbone.name}, {parameters / 1e6:.2f} M parameters, "
        f"{cfg.max_epochs} epochs of batch {cfg.optimizer.batch_size}, {device_title(cfg)}\n"
        f"{'resuming ' + str(checkpoint) if checkpoint else 'run folder'} {folder.path}",
        flush=True,
    )


def _fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    data: PretrainDataModule,
    checkpoint: Path | None,
    folder: RunFolder,
    checkpointer: Checkpointer,
) -> None:
    """Trains; an interruption ends with where to go on from, not with a traceback."""
    try:
        try:
            trainer.fit(model, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint))
        except Exception as error:
            received = checkpointer.preemption and checkpointer.preemption.received
            if received is None or worker_failure(error) is None:
                raise
            raise Preempted(received) from None  # the signal has ended a worker, too
    except Preempted as preempted:
        if trainer.is_global_zero:
            epoch = trainer.current_epoch + (not trainer.fit_loop.done)
            print(f"{preempted.signal.name} in epoch {epoch} of {trainer.max_epochs}; {_way_on(folder)}")
        raise SystemExit(preempted.exit_code) from None
    except FileNotFoundError as error:
        if folder.path.exists():
            raise
        raise UserError(
            f"the run folder {folder.path} must stay while the run is trained, was deleted; start the same "
            "command, it begins anew"
        ) from error
    except KeyboardInterrupt:
        pass
    except SystemExit:
        if not trainer.interrupted:
            raise
    if not trainer.state.finished:
        print(f"interrupted in epoch {trainer.current_epoch + 1} of {trainer.max_epochs}; {_way_on(folder)}")
        raise SystemExit(130)
    if trainer.global_step == 0:
        raise UserError(
            f"the training must make an optimiser step, made none in {trainer.num_training_batches} batches "
            "an epoch; lower optimizer.batch_size, or raise data.fraction or limit_train_batches"
        )


def _way_on(folder: RunFolder) -> str:
    """How an interrupted run is gone on with."""
    saved = folder.last_checkpoint
    if saved.exists():
        return f"resume with resume_from_checkpoint={saved}"
    return "no epoch was finished, nothing is saved"
