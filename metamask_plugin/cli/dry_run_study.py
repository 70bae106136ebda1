"""What all trials of a study would fail by, found before the first of them."""

import contextlib
import io
import json
from collections.abc import Sequence

import torch
from omegaconf import OmegaConf

from metamask_plugin.audit.confounders import REMOVALS, check_options
from metamask_plugin.cli.config import complete
from metamask_plugin.data import load_dataset
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.checkpoints import find_checkpoint
from metamask_plugin.modules.encoders import ENCODERS, build_encoder
from metamask_plugin.studies.roots import remedy
from metamask_plugin.studies.trial import TrialRun

EMBEDDED = ("digits", "confounded_digits")
"""Data sets that come with the package."""


def dry_run_trials(runs: Sequence[TrialRun], configs: bool = True) -> None:
    """Holds every trial's config against the schema and its method, and looks at each data set once.

    A trial that fails by a setting of its own does not keep the others from running: its record says it.

    Args:
        runs: all trials of a study.
        configs: whether the configs are for this machine.

    Raises:
        UserError: what every trial would fail by, or all data sets that are missing.
    """
    missing = [run for run in runs if not run.finished]
    if not missing:
        return
    one_seed = [run for run in runs if run.trial.seed == missing[0].trial.seed]
    faults = [_fault_of(run) for run in one_seed] if configs else [None]
    if None not in faults:
        alike = (
            "" if len(set(faults)) == 1 else f"every trial fails, the first ({one_seed[0].trial.title}) as: "
        )
        raise UserError(f"{alike}{faults[0]}")
    _require_data(missing)


def _fault_of(run: TrialRun) -> str | None:
    """The line that the trial would fail by; None where its settings fit."""
    checkpoint = run.trial.checkpoint
    try:
        if run.cfg is None:
            if not checkpoint.startswith("timm:"):
                find_checkpoint(checkpoint)
            return None
        cfg = run.cfg
        # the trial itself will print its notes
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            cfg = complete(cfg)
        audit = run.study.measures.get("confounder_audit", {})
        if audit.get("banzhaf_masks") is not None and cfg.backbone.name in ENCODERS:
            kwargs = OmegaConf.to_container(cfg.backbone.get("kwargs") or OmegaConf.create({}), resolve=True)
            with torch.device("meta"):
                dim = build_encoder(cfg.backbone.name, cfg.augmentations[0].crop_size, **kwargs).num_features
            check_options(dim, 1, audit["banzhaf_masks"], REMOVALS[0])
    except UserError as error:
        return str(error)
    return None


def _require_data(runs: Sequence[TrialRun]) -> None:
    """Looks at each data set once.

    Raises:
        UserError: with all that are missing.
    """
    first: dict[str, TrialRun] = {}
    for run in runs:
        if run.trial.dataset is not None:
            first.setdefault(run.trial.dataset, run)
        elif run.cfg is not None and run.cfg.data.dataset not in EMBEDDED:
            load = json.dumps(OmegaConf.to_container(run.cfg.data, resolve=True), sort_keys=True, default=str)
            first.setdefault(load, run)
    faults = {}
    for name, run in first.items():
        try:
            load_dataset(run.cfg.data)
        except UserError as error:
            if run.trial.dataset is None:
                raise
            faults[name] = (run.cfg.data.train_path, error)
    if faults:
        where = ", ".join(f"{name} in {path}" for name, (path, _) in faults.items())
        reason = next(iter(faults.values()))[1]
        there = [name for name in first if name not in faults]
        raise UserError(f"data must be there, missing: {where} ({reason}); {remedy(list(faults), there)}")
