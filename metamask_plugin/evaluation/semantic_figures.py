"""Draws ICL-MSR: foreground against background, and what the semantic weight vectors look at."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metamask_plugin.audit.figures import BLUE, GREEN, ORANGE, PURPLE, style_axes
from metamask_plugin.data.regions import REGIONS
from metamask_plugin.errors import check
from metamask_plugin.evaluation.redundancy import mean_off_diagonal
from metamask_plugin.evaluation.regions import GROUP, SETTINGS

MAX_DRAWN_IMAGES = 6
MAX_DRAWN_VECTORS = 14
# a matrix of more vectors has no room for its numbers
MAX_NUMBERED_VECTORS = 8
# groups and bars that fit into half of a figure's width with their labels below and their numbers above
MAX_GROUPS_BESIDE, MAX_BARS_BESIDE = 4, 9


def region_bars(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Accuracy by what was trained on and tested on, after Figs. 1 and 4 of [0].

    A group of bars for each (trained on, tested on), first those that the paper numbers, then the others; in
    a group one bar for each name. A panel for kNN and one for the linear probe, where there are both. A bar
    with ``<accuracy>_std`` has an error bar of that length to either side.

    Args:
        rows: of :func:`~metamask_plugin.evaluation.regions.summarise_seeds`, one for each bar; accuracies
            ``knn<k>`` and ``linear`` in percent, of which some may be missing.

    Raises:
        UserError: without rows or accuracies, or with two rows for one bar.

    [0] Qiang et al., *Interventional Contrastive Learning with Meta Semantic Regularizer*, ICML 2022.
    """
    found = {tuple(row[key] for key in GROUP): row for row in rows}
    check(len(found) == len(rows), "rows", "one for each bar", len(rows), "summarise the seeds first")
    names = list(dict.fromkeys(name for name, *_ in found))
    groups = sorted({(trained, tested) for _, trained, tested in found}, key=_paper_first)
    columns = list(dict.fromkeys(key for row in rows for key, value in row.items() if value is not None))
    metrics = [key for key in columns if key == "linear" or (key[:3] == "knn" and key[3:].isdecimal())]
    check(len(metrics) > 0, "rows", "at least one, with a column knn<k> or linear", columns)
    beside = len(groups) <= MAX_GROUPS_BESIDE and len(groups) * len(names) <= MAX_BARS_BESIDE
    shape = (1, len(metrics)) if beside else (len(metrics), 1)
    figure = Figure(figsize=(4.6 * shape[1] if beside else 9, 3.4 * shape[0]), layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, sharey=True).flat
    for axes, metric in zip(panels, metrics):
        for place, name in enumerate(names):
            _bars(axes, place, len(names), [found.get((name, *group), {}) for group in groups], metric, name)
        numbers = [f" ({SETTINGS[group]})" if group in SETTINGS else "" for group in groups]
        ticks = [f"{trained} →\n{tested}{number}" for (trained, tested), number in zip(groups, numbers)]
        axes.set_xticks(range(len(groups)), ticks, fontsize=8)
        style_axes(axes, "Linear probe" if metric == "linear" else f"kNN, k = {metric[3:]}", "y")
        axes.tick_params(axis="x", length=0)
        if axes is figure.axes[0] or not beside:
            axes.set_ylabel("test accuracy (%)")
    about = f"pretrained on → tested on (number of the setting in ICL-MSR){_error_bars(rows)}"
    figure.supxlabel(about, fontsize=9)
    style = {"loc": "outside upper center", "ncols": min(4, len(names)), "frameon": False, "fontsize": 9}
    figure.legend(*figure.axes[0].get_legend_handles_labels(), **style)
    return figure


def semantic_maps(images: torch.Tensor, maps: torch.Tensor, weights: torch.Tensor) -> Figure:
    """Where each weight vector of ICL-MSR's ``f_msr`` looks, and where it looks other than the rest.

    Two rows an image. Upper: the image, then for each vector ``t`` its heat map
    ``relu(sum over c of a[t, c] * map[c])``, enlarged bilinearly and laid half transparent over the image in
    grey. Lower: the mean of those heat maps over ``t``, then the deviation of each from that mean.

    Sums of feature maps that are nowhere negative with weights that are nowhere negative all look much alike:
    the upper row shows what they share, the lower one what sets them apart. Heat is in units of the largest
    heat of that image, deviations too, and each of the two colour scales is the same for all images: a
    deviation scale that ends at 0.01 means that the vectors see nearly the same.

    At most the first 6 images and the first 14 vectors are drawn; means are over all vectors.

    Args:
        images: in [0, 1], shape (B, 3, H, W).
        maps: the encoder's last feature maps of them, shape (B, C, h, w).
        weights: ``A``, shape (B, n, C).

    Raises:
        UserError: for shapes that do not fit.
    """
    fits = images.ndim == 4 and images.shape[1] == 3 and len(images) == len(weights)
    check(fits, "images", f"of shape ({len(weights)}, 3, H, W)", tuple(images.shape))
    images, maps, weights = (
        tensor[:MAX_DRAWN_IMAGES].detach().float().cpu() for tensor in (images, maps, weights)
    )
    heat = weighted_maps(maps, weights)
    heat = F.interpolate(heat, images.shape[2:], mode="bilinear", align_corners=False)
    heat = heat / heat.amax(dim=(1, 2, 3), keepdim=True).clamp(min=1e-12)
    mean = heat.mean(dim=1, keepdim=True)
    deviation = heat - mean
    limit = max(1e-6, float(deviation.abs().max()))
    total = heat.shape[1]
    count, drawn = len(images), min(total, MAX_DRAWN_VECTORS)
    aspect = images.shape[2] / images.shape[3]
    cell = min(1.6, 10.5 / (drawn + 1), 10.5 / (2 * count * aspect))
    # between two images a narrow row of nothing
    heights = ([1, 1, 0.1] * count)[:-1]
    size = (max(5.0, cell * (drawn + 1) + 0.5), cell * aspect * sum(heights) + 1.2)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    grid = figure.subplots(len(heights), drawn + 1, height_ratios=heights, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    warm = {"cmap": "inferno", "vmin": 0, "vmax": 1}
    signed = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    for i, (image, upper, lower) in enumerate(zip(images, grid[0::3], grid[1::3])):
        upper[0].imshow(image.permute(1, 2, 0).clamp(0, 1).numpy())
        shared = _overlay(lower[0], image, mean[i, 0], warm)
        for t in range(drawn):
            _overlay(upper[t + 1], image, heat[i, t], warm)
            # the image faintly: its own darkness would pass for a deviation
            apart = _overlay(lower[t + 1], 0.6 + 0.4 * image, deviation[i, t], signed)
        for axes, left, right in ((upper, "image", "heat"), (lower, "mean heat", "deviation")):
            axes[0].set_ylabel(left, fontsize=7)
            axes[-1].yaxis.set_label_position("right")
            axes[-1].set_ylabel(right, fontsize=7)
    for t, axes in enumerate(grid[0, 1:], start=1):
        axes.set_title(f"t = {t}", fontsize=8, pad=3)
    shown = f"{drawn} of the {total}" if drawn < total else f"the {total}"
    figure.suptitle(f"Heat maps of {shown} semantic weight vectors", fontsize=10)
    half = max(1, (drawn + 1) // 2)
    bar = {"location": "bottom", "aspect": 25, "pad": 0.01, "shrink": 0.8}
    for picture, columns, label in (
        (shared, grid[:, :half], "heat (largest: 1)"),
        (apart, grid[:, half:], "deviation from the mean over t"),
    ):
        colours = figure.colorbar(picture, ax=columns, **bar)
        colours.set_label(label, fontsize=8)
        colours.ax.tick_params(labelsize=8)
    return figure


def gram_matrix(before: torch.Tensor, after: torch.Tensor) -> Figure:
    """How alike the weight vectors of an image are, before and after training.

    The cosine of every two of its ``n`` vectors, averaged over the images; with up to 8 vectors as numbers
    too. One colour scale: from 0, or -1 where a mean cosine is negative, to 1. The mean outside the diagonal
    is in the titles.

    Args:
        before: ``A``, shape (B, n, C), at any scale.
        after: the same, after training.

    Raises:
        UserError: for shapes that do not fit, or fewer than two vectors.
    """
    grams = [mean_gram(weights.detach().float().cpu()) for weights in (before, after)]
    sizes = tuple(len(gram) for gram in grams)
    check(sizes[0] == sizes[1] >= 2, "semantic weights", "2 or more vectors, before as after", sizes)
    negative = min(float(gram.min()) for gram in grams) < 0
    scale = {"cmap": "RdBu_r" if negative else "viridis", "vmin": -1 if negative else 0, "vmax": 1}
    figure = Figure(figsize=(8.4, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, gram, name in zip(panels, grams, ("before training", "after training")):
        picture = axes.imshow(gram.numpy(), interpolation="nearest", **scale)
        axes.set_title(f"{name}: mean off the diagonal {mean_off_diagonal(gram):.3f}", fontsize=10)
        axes.set(xlabel="vector t", ylabel="vector t")
        axes.set_xticks(range(sizes[0]), range(1, sizes[0] + 1), fontsize=8)
        axes.set_yticks(range(sizes[0]), range(1, sizes[0] + 1), fontsize=8)
        if sizes[0] <= MAX_NUMBERED_VECTORS:
            _write_values(axes, gram, picture)
    figure.colorbar(picture, ax=panels, label="mean cosine of two vectors", shrink=0.85)
    return figure


def weighted_maps(maps: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Heat maps ``relu(sum over c of a[t, c] * map[c])``, one for each weight vector ``t``.

    Args:
        maps: the encoder's last feature maps, shape (B, C, h, w).
        weights: ``A`` of the same images, shape (B, n, C).

    Returns:
        Shape (B, n, h, w).

    Raises:
        UserError: for shapes that do not fit.
    """
    _check_weights(weights)
    fits = maps.ndim == 4 and maps.shape[:2] == weights.shape[::2]
    check(fits, "feature maps", f"of shape ({len(weights)}, {weights.shape[2]}, h, w)", tuple(maps.shape))
    return torch.einsum("bnc,bchw->bnhw", weights, maps).relu()


def mean_gram(weights: torch.Tensor) -> torch.Tensor:
    """Cosine of every two weight vectors of an image, averaged over the images.

    Args:
        weights: ``A``, shape (B, n, C), at any scale.

    Returns:
        Shape (n, n), with 1 on the diagonal (0 for vectors that are 0).

    Raises:
        UserError: for another shape, or no images.
    """
    _check_weights(weights)
    unit = F.normalize(weights, dim=2)
    return (unit @ unit.transpose(1, 2)).mean(dim=0)


def _check_weights(weights: torch.Tensor) -> None:
    fits = weights.ndim == 3 and min(weights.shape) > 0
    check(fits, "semantic weights", "of shape (B, n, C), one or more of each", tuple(weights.shape))


def _paper_first(group: tuple[str, str]) -> tuple:
    return SETTINGS.get(group, len(SETTINGS) + 1), *(REGIONS.index(region) for region in group)


def _error_bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """What the error bars are, where there are any."""
    drawn = [row for row in rows if any(key.endswith("_std") and row[key] is not None for key in row)]
    counts = sorted({row["n"] for row in drawn})
    several = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else "".join(map(str, counts))
    return f"\nerror bars: ± one standard deviation over {several} seeds" if counts else ""


def _bars(
    axes: Axes, place: int, count: int, rows: Sequence[Mapping[str, Any]], metric: str, name: str
) -> None:
    """The bars of the ``place``-th of ``count`` names, one a group, with the values over them."""
    width = 0.8 / count
    centres = [group + (place - (count - 1) / 2) * width for group in range(len(rows))]
    known = [(x, row) for x, row in zip(centres, rows) if row.get(metric) is not None]
    style = {"color": (BLUE, ORANGE, GREEN, PURPLE)[place % 4], "hatch": "///" if place >= 4 else None}
    heights = [row[metric] for _, row in known]
    axes.bar([x for x, _ in known], heights, 0.92 * width, edgecolor="white", lw=0, label=name, **style)
    for x, row in known:
        std = row.get(f"{metric}_std") or 0.0
        if std:
            axes.errorbar(x, row[metric], std, color="black", linewidth=0.9, capsize=2.5)
        above = {"textcoords": "offset points", "xytext": (0, 2), "ha": "center", "va": "bottom"}
        axes.annotate(f"{row[metric]:.1f}", (x, row[metric] + std), fontsize=7, **above)


def _overlay(axes: Axes, image: torch.Tensor, values: torch.Tensor, scale: Mapping[str, Any]):
    """``values`` (H, W) half transparent over the image (3, H, W) in grey; returns its picture."""
    axes.imshow(image.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1)
    return axes.imshow(values.numpy(), alpha=0.55, **scale)


def _write_values(axes: Axes, matrix: torch.Tensor, picture) -> None:
    for i, row in enumerate(matrix.tolist()):
        for j, value in enumerate(row):
            red, green, blue, _ = picture.to_rgba(value)
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
            text = f"{value:.3f}".replace("-0.000", "0.000")
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
