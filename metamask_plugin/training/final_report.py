"""How a run ends: a table, a summary, three pictures, and the next command."""

import os
import platform
import shlex
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from torch import nn

import metamask_plugin
from metamask_plugin.evaluation import figures
from metamask_plugin.evaluation.features import extract_features
from metamask_plugin.evaluation.report import evaluate_rows, format_table, write_summary
from metamask_plugin.training.evaluation_data import EvaluationData
from metamask_plugin.training.history import History
from metamask_plugin.training.run_folder import RunFolder, write_text


def final_report(
    cfg: DictConfig,
    folder: RunFolder,
    data: EvaluationData,
    initial: nn.Module,
    model: pl.LightningModule,
    history: History,
    seconds: float,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Evaluates raw pixels, the random initialisation and the trained encoder; writes and prints it all.

    Args:
        cfg: the run's config.
        folder: gets ``summary.json``, ``table.txt`` and the PNGs.
        data: the run's labelled images.
        initial: the backbone as it was before training.
        model: the trained method.
        history: the run's epochs.
        seconds: training time of this process, for the summary.
        device: where to compute features and probes.

    Returns:
        The table's rows.
    """
    ks = list(cfg.evaluation.knn.k)
    print(
        "evaluating: kNN and linear probe on raw pixels, random initialisation, trained encoder", flush=True
    )
    mask = model.mask.values().cpu() if hasattr(model, "mask") else None
    rows = evaluate_rows(
        data,
        {"random initialisation": initial, "trained encoder": model.backbone},
        masks=None if mask is None else {"trained encoder": mask},
        ks=ks,
        temperature=cfg.evaluation.knn.temperature,
        protocol=cfg.evaluation.linear.protocol,
        seed=cfg.seed,
        device=device,
    )
    table = format_table(rows)
    write_text(folder.path / "table.txt", table + "\n")
    _draw(folder, data, initial, model.backbone, mask, history, device)
    best = history.best(f"knn{ks[0]}")
    write_summary(
        folder.summary,
        {
            "name": cfg.name,
            "method": cfg.method,
            "dataset": cfg.data.dataset,
            "backbone": cfg.backbone.name,
            "seed": cfg.seed,
            "epochs": len(history.rows),
            "training_seconds": round(seconds, 1),
            "table": rows,
            "last_epoch": history.rows[-1] if history.rows else None,
            "best_epoch": best,
            "versions": {
                "metamask_plugin": metamask_plugin.__version__,
                "torch": torch.__version__,
                "lightning": pl.__version__,
                "python": platform.python_version(),
            },
            "hardware": {"device": str(device), "threads": torch.get_num_threads()},
        },
    )
    _say(folder, table, best, ks[0])
    return rows


def _draw(folder, data, initial, trained, mask, history, device) -> None:
    figures.save(figures.training_curves(history.rows), folder.path / "curves.png")
    if mask is not None and history.masks:
        figures.save(figures.mask_weights(mask, torch.stack(history.masks)), folder.path / "mask.png")
    before = extract_features(initial, data.evaluation_loader("test"), device)
    after = extract_features(trained, data.evaluation_loader("test"), device)
    figures.save(
        figures.feature_correlation(before.feats, after.feats, before.labels),
        folder.path / "feature_correlation.png",
    )


def _say(folder: RunFolder, table: str, best: dict[str, Any] | None, k: int) -> None:
    print(f"\n{table}\n")
    if best is not None:
        print(f"best epoch by kNN-{k}: {best['epoch'] + 1} ({best[f'knn{k}']:.2f} %)")
    print(f"in {folder.path}: curves.png, mask.png, feature_correlation.png, metrics.csv, summary.json")
    print(f"next: {_python()} main_knn.py --pretrained_checkpoint_dir {shlex.quote(str(folder.path))}")


def _python() -> str:
    """How the user calls this interpreter: by its path if it lies in this folder, as ``.venv/bin/python``."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else shlex.quote(path)
