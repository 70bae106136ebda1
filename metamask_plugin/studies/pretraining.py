"""From a trial to its pretraining config, and to the command that makes the same run by hand."""

import functools
import hashlib
import json
import shlex
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from metamask_plugin import SCRIPTS
from metamask_plugin.config.pretraining import Pretraining
from metamask_plugin.config.read import with_defaults
from metamask_plugin.errors import UserError, shown
from metamask_plugin.evaluation.checkpoints import content_digest
from metamask_plugin.renamed import OLD_NAMES, earlier_value, with_new_names
from metamask_plugin.studies.spec import Study, Trial
from metamask_plugin.training.experiment import NOT_THE_EXPERIMENT, leaves


def pretraining_config(study: Study, trial: Trial) -> DictConfig:
    """The trial's pretraining config: runs are shared by all studies, and evaluated by the measures alone.

    Raises:
        UserError: when the config or an override does not exist.
    """
    cfg = _composed(trial.config, trial.overrides).copy()
    OmegaConf.set_struct(cfg, False)
    cfg.seed = trial.seed
    if trial.epochs != 1:
        cfg.max_epochs = max(1, round(cfg.max_epochs * trial.epochs))
    cfg.checkpoint.dir = str(Path(study.config["runs_dir"]))
    OmegaConf.update(cfg, "evaluation.final_report", False, force_add=True)
    cfg.auto_resume = {"enabled": True, "extend": False}  # trials of other lengths are compared
    return cfg


def command(study: Study, trial: Trial, cfg: DictConfig) -> str:
    """What makes the trial's run by hand."""
    epochs = [f"max_epochs={cfg.max_epochs}"] if trial.epochs != 1 else []
    words = ["--config-name", trial.config, *trial.overrides, *epochs, f"seed={trial.seed}"]
    return f"python main_pretrain.py {shlex.join(words)}"


def digest(study: Study, trial: Trial, cfg: DictConfig | None) -> str:
    """Eight hex digits that differ whenever a trial would train or measure something else."""
    content = {"factors": trial.factors, "seed": trial.seed, "measures": study.measures}
    if cfg is None:
        content["checkpoint"] = _identity(trial.checkpoint)
        content["data"] = study.data
    else:
        content["pretraining"] = _settings(cfg)
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:8]


def _settings(cfg: DictConfig) -> dict[str, Any]:
    """What of a config decides what is trained: it says the same with and without a key's default."""
    defaults = dict(leaves(with_defaults(Pretraining, {})))
    node = with_new_names(OmegaConf.to_container(cfg, resolve=True), quiet=True)
    node["method"] = earlier_value("method", node["method"])  # as trials of earlier versions recorded it
    found = leaves(node)
    aside = tuple(f"{key}." for key in NOT_THE_EXPERIMENT)
    return {
        key: value
        for key, value in found
        if not f"{key}.".startswith(aside) and value != defaults.get(key, ...)
    }


def check_different(trials: Iterable[tuple[Trial, DictConfig | None]]) -> None:
    """Refuses two trials that train the same encoder: their levels would differ in name alone.

    Args:
        trials: with their pretraining configs; None for an encoder that is there already.

    Raises:
        UserError: with the first two.
    """
    seen: dict[str, Trial] = {}
    for trial, cfg in trials:
        if cfg is None:
            continue
        same = seen.setdefault(json.dumps(_settings(cfg), sort_keys=True, default=str), trial)
        if same is not trial:
            factors = [name for name, value in trial.factors.items() if value != same.factors[name]]
            names = [" and ".join(f"{shown(one.factors[name])}" for name in factors) for one in (same, trial)]
            raise UserError(
                f"factors.{factors[0]} must be levels that train different encoders, got {names[0]} and "
                f"{names[1]} with the same settings; take one of them out, or take out of the overrides "
                "(behind --) what they differ in"
            )


def _identity(checkpoint: str) -> list[str]:
    """A checkpoint's path, and what its files hold: their dates may be those of other files (rsync -t)."""
    path = Path(checkpoint)
    if checkpoint.startswith("timm:") and "=" in checkpoint:
        path = Path(checkpoint.partition("=")[2])
    files = sorted(path.glob("*.ckpt")) if path.is_dir() else [path] if path.is_file() else []
    beside = (path if path.is_dir() else path.parent) / "args.json"
    files += [beside] if files and beside.is_file() else []
    return [checkpoint, *(f"{file.name} {content_digest(file)}" for file in files)]


@functools.cache
def _composed(config: str, overrides: tuple[str, ...]) -> DictConfig:
    with _own_hydra():
        try:
            return compose(config, [_composable(word) for word in overrides])
        except (HydraException, OmegaConfBaseException) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"the pretraining config {config} with {shlex.join(overrides)} must compose, got: {reason}"
            ) from error


def _composable(word: str) -> str:
    """An old name is in no config any more: it is added."""
    return f"++{word}" if word.partition("=")[0] in OLD_NAMES else word


@contextmanager
def _own_hydra() -> Iterator[None]:
    """A study is itself a Hydra application: it is put aside while another config is composed."""
    study = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(SCRIPTS.resolve() / "pretrain"), version_base="1.2"):
            yield
    finally:
        GlobalHydra.instance().hydra = study
