"""The final report of a run: tables, a summary, pictures, and the next command."""

import os
import platform
import shlex
import sys
from typing import Any

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from omegaconf import DictConfig

import metamask_plugin
from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import figures, semantic_figures
from metamask_plugin.evaluation.features import extract_features, feature_std
from metamask_plugin.evaluation.files import write_whole
from metamask_plugin.evaluation.labelled_images import LabelledImages
from metamask_plugin.evaluation.linear import PROTOCOLS
from metamask_plugin.evaluation.redundancy import similarity_figure
from metamask_plugin.evaluation.regions import region_accuracies
from metamask_plugin.evaluation.report import (
    errors_in_words,
    evaluate_rows,
    evaluation_in_words,
    format_table,
    without_errors,
    write_summary,
)
from metamask_plugin.modules.encoder_split import EncoderSplit
from metamask_plugin.training.callbacks import History
from metamask_plugin.training.run_folder import RunFolder

SEMANTIC_SAMPLES, SEMANTIC_IMAGES = 256, 3
"""Number of test images over which A's Gram matrix is averaged, and whose maps are drawn."""


def evaluation_of(cfg: DictConfig, data: LabelledImages) -> dict[str, Any]:
    """The settings and test images that decide the numbers of an encoder's final report."""
    return {
        "knn": {"k": list(cfg.evaluation.knn.k), "temperature": cfg.evaluation.knn.temperature},
        "linear": {"protocol": cfg.evaluation.linear.protocol},
        "resize": cfg.data.get("evaluation_resize"),
        "images_fingerprint": data.fingerprint(),
    }


def final_report(
    cfg: DictConfig,
    folder: RunFolder,
    data: LabelledImages,
    initial: pl.LightningModule,
    model: pl.LightningModule,
    history: History,
    seconds: float,
    device: torch.device,
) -> None:
    """Evaluates raw pixels, the random initialisation and the trained encoder; writes and prints the results.

    Args:
        cfg: the run's config.
        folder: gets ``summary.json``, ``table.txt`` and the PNGs.
        data: the run's labelled images.
        initial: the method before training.
        model: the trained method.
        history: of the run.
        seconds: training time of this process, for the summary.
        device: computes features and probes.
    """
    ks = list(cfg.evaluation.knn.k)
    print(
        "evaluating: kNN and linear probe on raw pixels, random initialisation, trained encoder", flush=True
    )
    mask = model.mask.values().cpu() if hasattr(model, "mask") else None
    rows = evaluate_rows(
        data,
        {"random initialisation": initial.backbone, "trained encoder": model.backbone},
        masks=None if mask is None else {"trained encoder": mask},
        ks=ks,
        temperature=cfg.evaluation.knn.temperature,
        protocol=cfg.evaluation.linear.protocol,
        seed=cfg.seed,
        device=device,
        originals=data.originals,
    )
    regions = _regions(cfg, data, initial, model, device) if data.has_boxes else []
    protocol = PROTOCOLS[cfg.evaluation.linear.protocol]
    evaluated = evaluation_in_words(ks, cfg.evaluation.knn.temperature, protocol)
    errors = errors_in_words(rows, data.originals)
    table = f"{format_table(without_errors(rows))}\n{evaluated}\n{errors}"
    if regions:
        table += f"\n\n{format_table(regions)}"
    write_whole(folder.table, table + "\n")
    before, after = (
        extract_features(method.backbone, data.evaluation_loader("test"), device)
        for method in (initial, model)
    )
    pictures = _draw(folder, data, initial, model, mask, history, before, after)
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
            "data_wait_share": history.mean("data_wait_share"),
            "table": rows,
            "evaluation": evaluated,
            "evaluated_with": evaluation_of(cfg, data),
            "regions": regions,
            "feature_std": {
                "random initialisation": feature_std(before.feats),
                "trained encoder": feature_std(after.feats),
            },
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
    print(f"\n{table}\n")
    if best is not None:
        print(f"best epoch by kNN-{ks[0]}: {best['epoch'] + 1} ({best[f'knn{ks[0]}']:.2f} %)")
    print(f"in {folder.path}: {', '.join(pictures)}, metrics.csv, summary.json")
    print(f"next: {_python()} main_knn.py --pretrained_checkpoint_dir {shlex.quote(str(folder.path))}")


def _regions(
    cfg: DictConfig,
    data: LabelledImages,
    initial: pl.LightningModule,
    model: pl.LightningModule,
    device: torch.device,
) -> list[dict[str, Any]]:
    """Accuracies on full images, foregrounds and backgrounds of classifiers learnt on the training region."""
    node, k = cfg.data, cfg.evaluation.knn.k[0]
    trained_on = node.get("region") or "full"
    rows, form = [], node.get("region_form") or "fill"
    for name, method in (("random initialisation", initial), ("trained encoder", model)):
        tested = region_accuracies(
            method.backbone,
            lambda split, region: data.evaluation_loader(split, region=region, form=form),
            trained_on,
            k=k,
            temperature=cfg.evaluation.knn.temperature,
            protocol=cfg.evaluation.linear.protocol,
            seed=cfg.seed,
            device=device,
        )
        for classifier in (f"knn{k}", "linear"):
            row = {f"learnt on {trained_on}, tested on": name, "classifier": classifier}
            rows.append(row | {region["tested on"]: region[classifier] for region in tested})
    return rows


def _draw(folder, data, initial, model, mask, history, before, after) -> list[str]:
    """Draws the figures of the method; returns the files' names."""
    pictures = {"curves.png": figures.training_curves(history.rows)}
    if mask is not None and history.masks:
        pictures["mask.png"] = figures.mask_weights(mask, torch.stack(history.masks))
    compared = {"before training": before, "after training": after}
    pictures["feature_correlation.png"] = similarity_figure(compared)
    if getattr(model, "regularizer", None) is not None:
        pictures |= _semantic_pictures(data, initial, model)
    for name, figure in pictures.items():
        figures.save(figure, folder.path / name)
    return list(pictures)


@torch.no_grad()
def _semantic_pictures(
    data: LabelledImages, initial: pl.LightningModule, model: pl.LightningModule
) -> dict[str, Figure]:
    """Maps of ICL-MSR's weight vectors, and their Gram matrices."""
    originals = data.samples(SEMANTIC_SAMPLES, model.original.crop_size)
    before, after = (method.regularizer.cpu().eval()(originals) for method in (initial, model))
    pictures = {}
    if model.regularizer.n > 1:
        pictures["semantic_gram.png"] = semantic_figures.gram_matrix(before, after)
    images = data.samples(SEMANTIC_IMAGES)
    backbone = model.backbone.cpu().eval()
    try:
        maps = EncoderSplit(backbone, images.shape[-1]).front(images)
    except UserError:  # a transformer has tokens, no maps
        return pictures
    if maps.shape[1] == after.shape[2]:  # the weights are channels', not the projection's
        weights = after[:SEMANTIC_IMAGES]
        pictures["semantic_maps.png"] = semantic_figures.semantic_maps(data.pixels(images), maps, weights)
    return pictures


def _python() -> str:
    """The user's name of this interpreter: its path if it lies in this folder, as ``.venv/bin/python``."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else shlex.quote(path)
