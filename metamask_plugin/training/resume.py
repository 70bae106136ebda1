"""Where a run is trained, and the checkpoint that it resumes from."""

import contextlib
import glob
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from metamask_plugin.errors import UserError, check
from metamask_plugin.evaluation.checkpoints import (
    encoder_weights,
    read_args,
    read_checkpoint,
    recorded_host,
)
from metamask_plugin.evaluation.encoder import network_of
from metamask_plugin.evaluation.files import replacing
from metamask_plugin.renamed import earlier_value
from metamask_plugin.training.experiment import (
    NOT_IN_THE_DIGEST,
    RAISABLE,
    differences,
    experiment_digest,
    in_words,
)
from metamask_plugin.training.run_folder import CheckpointHeader, RunFolder, header_of, is_locked

NAME = "resume_from_checkpoint"

OF_THE_EPOCH = (
    "seed",
    "data",
    "augmentations",
    "optimizer.batch_size",
    "accumulate_grad_batches",
    "limit_train_batches",
    "devices",
    "num_nodes",
)
"""Settings that decide an epoch's batches and their order."""

OF_THE_STATE = (
    "method",
    "method_kwargs.meta.optimizer.name",
    "method_kwargs.task",
    "optimizer.exclude_bias_n_norm_wd",
    "optimizer.kwargs.exclude_bias_n_norm",
    "optimizer.name",
    "scheduler.interval",
    "scheduler.name",
)
"""Settings that must be equal for a checkpoint's optimiser and schedule states to have a meaning."""

IMAGES = "data.images_fingerprint"

BEGAN = "began_with"
"""Key of an experiment: the checkpoint of another run that this one began with."""

Differences = dict[str, tuple[Any, Any]]
"""See :func:`~metamask_plugin.training.experiment.differences`."""


@dataclass(frozen=True)
class Start:
    """Where a run is trained, and what it begins with.

    Attributes:
        folder: of the run.
        experiment: see :func:`~metamask_plugin.training.experiment.experiment_of`; with what it begins with.
        origin: the checkpoint of another run that it begins with; None for random weights.
    """

    folder: RunFolder
    experiment: dict[str, Any]
    origin: Path | None = None


@rank_zero_only
def tell(line: str) -> None:
    """Prints a line once for all processes of a run."""
    print(line, flush=True)


def start_of(cfg: DictConfig, experiment: dict[str, Any], model: nn.Module) -> Start:
    """Finds the folder of a run, ``<checkpoint.dir>/<method>/<name>-<digest>``.

    The same experiment has the same folder: the same command finds its own run again, finished or not, and a
    sweep never resumes another of its runs. The checkpoint that a run begins with belongs to the experiment.

    - ``resume_from_checkpoint`` of this very experiment leads to the folder of that checkpoint.
    - With ``auto_resume.extend``, a run without a folder begins with the checkpoint of a run that differs
      only in being shorter.
    - Without auto-resume the folder is a fresh one (``-2``, ``-3`` ...).

    Args:
        cfg: the complete config.
        experiment: see :func:`~metamask_plugin.training.experiment.experiment_of`.
        model: the method to train.
    """
    if cfg.resume_from_checkpoint is not None:
        named = Path(cfg.resume_from_checkpoint)
        header = header_of(named)
        return _own(cfg, named, header, experiment) or _begun(cfg, experiment, named, header)
    scratch = Start(RunFolder(_free(cfg, experiment)), experiment)
    extend = OmegaConf.select(cfg, "auto_resume.extend", default=True)
    if not (cfg.auto_resume.enabled and extend) or scratch.folder.has_begun:
        return scratch
    shorter = [
        (header.steps, _begun(cfg, experiment, neighbour.last_checkpoint, header))
        for neighbour, header, found in _neighbours(cfg, experiment)
        if _raised(found, header, experiment)
    ]
    shorter.sort(key=lambda found: (found[1].folder.has_begun, found[0]), reverse=True)
    for _, start in shorter:
        with contextlib.suppress(UserError):
            check_resumable(start.origin, model)
            return start
    return scratch


def _own(
    cfg: DictConfig, named: Path, header: CheckpointHeader | None, experiment: dict[str, Any]
) -> Start | None:
    """The run whose checkpoint the user names, if that is this very experiment."""
    home = named.absolute().parent
    runs = _runs(cfg, home.name)
    if header is None or home.parent != runs.absolute() or _settings_of(header.experiment, experiment):
        return None
    began = {key: value for key, value in header.experiment.items() if key == BEGAN}
    return Start(RunFolder(runs / home.name), {**experiment, **began})


def _begun(
    cfg: DictConfig, experiment: dict[str, Any], origin: Path, header: CheckpointHeader | None
) -> Start:
    """The run that begins with a checkpoint of another run."""
    run = experiment_digest(header.experiment) if header else origin.absolute().parent.name
    experiment = {**experiment, BEGAN: f"{run}/{origin.name}"}
    return Start(RunFolder(_free(cfg, experiment)), experiment, origin)


def _runs(cfg: DictConfig, run: str = "") -> Path:
    """The folder of a method's runs; of its earlier name, where that has the run and the new one has not."""
    names = cfg.method, earlier_value("method", cfg.method)
    folders = [Path(cfg.checkpoint.dir) / name for name in names]
    return next((folder for folder in folders if (folder / run).exists()), folders[0])


def _free(cfg: DictConfig, experiment: Mapping[str, Any]) -> Path:
    """The experiment's folder; without auto-resume the first that is not there yet."""
    name = f"{cfg.name}-{experiment_digest(experiment)}"
    stem = _runs(cfg, name) / name
    path, attempt = stem, 1
    while not cfg.auto_resume.enabled and path.exists():
        attempt += 1
        path = stem.with_name(f"{stem.name}-{attempt}")
    return path


def _neighbours(
    cfg: DictConfig, experiment: Mapping[str, Any]
) -> Iterator[tuple[RunFolder, CheckpointHeader, Differences]]:
    """Other runs of the same name that no process trains now: header, and differences from this one."""
    for path in _runs(cfg).glob(f"{glob.escape(cfg.name)}-*"):
        neighbour = RunFolder(path)
        header = header_of(neighbour.last_checkpoint)
        if header is not None and not is_locked(path):
            found = _settings_of(header.experiment, experiment)
            if found:
                yield neighbour, header, found


def _settings_of(recorded: Mapping[str, Any] | None, experiment: Mapping[str, Any]) -> Differences:
    """Settings in which a checkpoint's run differs from this one; what either began with is no setting."""
    found = differences(recorded, experiment)
    return {key: value for key, value in found.items() if key != BEGAN}


def _raised(found: Differences, header: CheckpointHeader, experiment: Mapping[str, Any]) -> bool:
    """Whether two runs differ only in that the second is longer, and it has steps left."""
    unlimited = {None: float("inf"), -1: float("inf")}
    limit = experiment.get("max_steps")
    if header.steps >= unlimited.get(limit, limit) or header.epochs >= experiment["max_epochs"]:
        return False
    if not found.keys() <= {*RAISABLE, *NOT_IN_THE_DIGEST} or not found.keys() & set(RAISABLE):
        return False
    lengths = [found[key] for key in RAISABLE if key in found]
    return all(unlimited.get(there, there) < unlimited.get(here, here) for there, here in lengths)


def checkpoint_for(cfg: DictConfig, start: Start, model: nn.Module) -> Path | None:
    """The checkpoint to resume from, checked before anything starts; None to begin at random weights.

    A checkpoint in the run's own folder goes first: it is newer than what the run began with.

    Args:
        cfg: the complete config.
        start: of the run.
        model: the method to train.

    Raises:
        UserError: there are checkpoints, and none is usable.
    """
    folder, named = start.folder, cfg.resume_from_checkpoint
    own = _resumable(folder, model, start.experiment)
    if own is not None:
        if named is not None and Path(named).absolute() != own.absolute():
            tell(f"note: going on from {own}, the newest of this run, and not from {named}")
        return own
    if start.origin is not None:
        _check_origin(start.origin, model, start.experiment, was_named=named is not None)
        return start.origin
    if (folder.path / "metrics.csv").exists():
        tell(f"note: {folder.path} has no checkpoint: the run is trained anew")
    elif cfg.auto_resume.enabled:
        _tell_of_another(cfg, start.experiment)
    return None


def _tell_of_another(cfg: DictConfig, experiment: Mapping[str, Any]) -> None:
    """Names the most similar run of this name that is unfinished, or has ended with other images."""
    others = [
        (len(found), header.epochs, neighbour, found)
        for neighbour, header, found in _neighbours(cfg, experiment)
        if not neighbour.is_finished or set(found) == {IMAGES}
    ]
    if others:
        _, epochs, neighbour, found = min(others, key=lambda other: other[:2])
        state = "has ended" if neighbour.is_finished else f"stands at epoch {epochs}"
        tell(
            f"note: another run of this name {state}, {neighbour.path}; it differs in {in_words(found)}; "
            f"go on from it with {NAME}={neighbour.last_checkpoint}"
        )


def adopt_best(checkpoint: Path, folder: RunFolder) -> None:
    """Copies the best checkpoint of the run that is resumed from, if it belongs to the same past."""
    theirs = RunFolder(checkpoint.parent).best_checkpoint
    own = checkpoint.parent.absolute() == folder.path.absolute()
    there, best = header_of(checkpoint), None if own else header_of(theirs)
    if best and there and best.best is not None and best.best == there.best:
        with replacing(folder.best_checkpoint) as file, theirs.open("rb") as source:
            shutil.copyfileobj(source, file)


def _resumable(folder: RunFolder, model: nn.Module, experiment: Mapping[str, Any]) -> Path | None:
    """A run's own last checkpoint, or the previous one if the last is unusable; None if there is none yet.

    An unusable last one is renamed to ``last.ckpt.unusable``, so that it does not replace the previous one.

    Raises:
        UserError: there are checkpoints, and none is usable.
        OSError: there is one without permission to read it.
    """
    reasons = []
    for path in (folder.last_checkpoint, folder.previous_checkpoint):
        if not path.exists():
            if path.is_symlink():
                reasons.append(f"checkpoint {path} must be a file, got a link to {os.readlink(path)}")
            continue
        with contextlib.suppress(IsADirectoryError), path.open("rb"):
            pass  # missing permission is no damage
        try:
            state = check_resumable(path, model)
            found = differences(state.get("identity"), experiment)
            drawn = [key for key in found if key in NOT_IN_THE_DIGEST]
            found = {key: value for key, value in found.items() if key not in NOT_IN_THE_DIGEST}
            if found:
                raise UserError(
                    f"checkpoint {path} must be of this run, got another experiment's: {in_words(found)}"
                )
        except UserError as error:
            reasons.append(str(error))
            continue
        if not state.get("identity"):
            tell(f"warning: {path} does not say of which run it is; its settings are not compared")
        if drawn:
            tell(f"note: {', '.join(drawn)} has changed: views are drawn differently from here on")
        for reason in reasons:
            tell(
                f"warning: {reason}\n"
                f"warning: resuming {path}, the one before; the other is now {_aside(folder)}"
            )
        return path
    if reasons:
        raise UserError(
            f"{reasons[0]}; {folder.path} holds no other that can be resumed: move it away, or train "
            "anew with auto_resume.enabled=False"
        )
    return None


def _aside(folder: RunFolder) -> str:
    aside = folder.last_checkpoint.with_name(folder.last_checkpoint.name + ".unusable")
    with contextlib.suppress(FileNotFoundError):  # another process of the run was quicker
        os.replace(folder.last_checkpoint, aside)
    return aside.name


def _check_origin(path: Path, model: nn.Module, experiment: Mapping[str, Any], was_named: bool) -> None:
    """Checks the checkpoint of another run that this one begins with, and prints how their settings differ.

    Args:
        path: the checkpoint.
        model: the method to train.
        experiment: of this run.
        was_named: whether the user named it; else it was found, and its run differs only in its length.

    Raises:
        UserError: it does not fit the model, is of another method or optimiser, has already been trained for
            as long, or was saved within an epoch whose batches are different here.
    """
    state = check_resumable(path, model)
    found = _settings_of(state.get("identity"), experiment)
    epochs = state.get("epoch", -1) + (0 if state.get("batches_done") else 1)
    for key, done in (("max_epochs", epochs), ("max_steps", state.get("global_step", -1))):
        limit = experiment.get(key, -1)
        expected = f"more than {done}, the {key.removeprefix('max_')} of the checkpoint {path}"
        check(limit == -1 or limit > done, key, expected, limit, f"set {key}={done + 1} or more")
    settled = {key: value for key, value in found.items() if key in OF_THE_STATE}
    if settled:
        raise UserError(
            f"{NAME} must be of a run with the same {', '.join(settled)}, got {str(path)!r}: "
            f"{in_words(settled)}; take these settings, or train anew"
        )
    batches = {
        key: value
        for key, value in found.items()
        if f"{key}.".startswith(tuple(f"{name}." for name in OF_THE_EPOCH)) and key not in NOT_IN_THE_DIGEST
    }
    if batches and state.get("batches_done"):
        raise UserError(
            f"{NAME} must be of a run with the same batches where it was saved within an epoch, got "
            f"{str(path)!r}: {in_words(batches)}; take these settings, or a checkpoint of a whole epoch"
        )
    if not was_named:
        tell(
            f"note: going on from {path}, which differs in {in_words(found)}; its learning rates followed "
            "the shorter schedule (auto_resume.extend=False begins anew)"
        )
    elif found:
        tell(f"warning: {path} was trained with other settings: {in_words(found)}; from here on these apply")


def check_resumable(path: Path, model: nn.Module) -> dict[str, Any]:
    """Reads a training checkpoint and checks that it fits the model.

    Args:
        path: a checkpoint written by :class:`~metamask_plugin.training.checkpoints.Checkpointer`.
        model: the method that is to resume from it.

    Returns:
        Its content.

    Raises:
        UserError: if the file is missing, is no training checkpoint, is of another architecture, or of the
            other host if that makes a difference.
    """
    if not path.is_file():
        raise UserError(f"{NAME} must be a checkpoint file, got {str(path)!r}, which does not exist")
    state = read_checkpoint(path)
    try:
        weights = state["state_dict"]
        state["optimizer_states"], state["loops"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{NAME} must be a training checkpoint, got {str(path)!r}, which cannot be read as one "
            f"({type(error).__name__}: {error})"
        ) from error
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise UserError(
                f"{NAME} must match the configured model, got {str(path)!r} of another architecture: "
                f"{name} is {expected.get(name, 'absent')} in the model and "
                f"{found.get(name, 'absent')} in the checkpoint; set backbone.name and method_kwargs "
                "as in the args.json beside it"
            )
    _check_host(path, model, weights)
    return state


def _check_host(path: Path, model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Refuses the other host's checkpoint if equal shapes hide another network or another LARS."""
    cfg, args = getattr(model, "cfg", None), read_args(path)
    recorded, used = recorded_host(args), OmegaConf.select(cfg, "host") if cfg is not None else None
    if None in (recorded, used) or recorded == used:
        return
    name = cfg.backbone.name
    remedy = f"resume it with METAMASK_HOST={recorded}, or train anew"
    if cfg.optimizer.name == "lars":
        raise UserError(
            f"{NAME} must be of the host in use, {used!r}, for optimizer.name='lars', got {str(path)!r} "
            f"trained under {recorded!r}; {remedy}"
        )
    size = OmegaConf.select(cfg, "augmentations[0].crop_size", default=32)
    kwargs = args["backbone"].get("kwargs") or {}
    with torch.device("meta"):  # only its description is needed
        theirs = network_of(name, size, kwargs, recorded, args.get("method"), encoder_weights(weights))
    if str(theirs) != str(model.backbone):
        raise UserError(
            f"{NAME} must be of the host in use, {used!r}, whose {name} is another network of the same "
            f"shapes, got {str(path)!r} trained under {recorded!r}; {remedy}"
        )
