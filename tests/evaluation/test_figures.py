"""Figures: what is drawn, from which numbers, and that the files are small pictures."""

import numpy as np
import pytest
import torch
from PIL import Image

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation import figures

GENERATOR = torch.Generator().manual_seed(0)
HISTORY = [
    {"epoch": e, "train_task_loss": 5.0 - e, "train_redundancy_loss": 200.0 / (e + 1), "knn20": 50.0 + e}
    for e in range(4)
]


def labels_of(axes):
    return [line.get_label() for line in axes.lines]


def test_curves_show_the_keys_that_are_there_and_their_values():
    losses, accuracies = figures.training_curves(HISTORY).axes
    assert labels_of(losses) == ["task", "redundancy reduction"]
    assert list(losses.lines[0].get_ydata()) == [5, 4, 3, 2]
    assert losses.get_yscale() == "log"
    assert labels_of(accuracies) == ["k = 20"]
    assert list(accuracies.lines[0].get_xdata()) == [1, 2, 3, 4]


def test_curves_skip_gaps_and_non_finite_values_and_say_what_is_missing():
    history = [
        {"epoch": 0, "train_task_loss": 1.0},
        {"epoch": 1, "train_task_loss": float("nan")},
        {"epoch": 2},
    ]
    losses, accuracies = figures.training_curves(history).axes
    assert list(losses.lines[0].get_xdata()) == [1]
    assert losses.get_yscale() == "linear"
    assert accuracies.texts[0].get_text() == "not recorded"
    with pytest.raises(UserError, match="history must be at least one epoch"):
        figures.training_curves([])


def test_a_loss_that_is_0_or_below_keeps_the_scale_linear():
    history = [
        {"epoch": e, "train_msr_loss": 500.0, "train_redundancy_loss": 1.0, "train_uniformity_loss": value}
        for e, value in enumerate((2.0, 0.0, -3.0))
    ]
    losses, _ = figures.training_curves(history).axes
    assert labels_of(losses) == ["redundancy reduction", "backdoor-adjusted (MSR)", "uniformity of A"]
    assert losses.get_yscale() == "linear"
    assert list(losses.lines[2].get_ydata()) == [2, 0, -3]
    assert losses.get_ylim()[0] < -3
    assert figures.training_curves(history[:1]).axes[0].get_yscale() == "log"


def test_mask_weights_are_sorted_with_their_mean_and_at_most_64_lines():
    history = 1 + 0.1 * torch.randn(7, 200, generator=GENERATOR)
    ordered, moving = figures.mask_weights(history[-1], history).axes
    assert np.allclose(ordered.lines[0].get_ydata(), np.sort(history[-1].numpy()))
    assert ordered.lines[1].get_ydata()[0] == pytest.approx(float(history[-1].mean()))
    assert len(moving.lines) == 64 + 1
    assert np.allclose(moving.lines[0].get_ydata(), history[:, history[-1].argmin()])
    assert np.allclose(moving.lines[-1].get_ydata(), history.mean(dim=1))
    with pytest.raises(UserError, match=r"mask history must be of shape \(T, 200\), got \(7, 9\)"):
        figures.mask_weights(history[-1], history[:, :9])


def test_files_are_pictures_of_less_than_200_kb(tmp_path):
    history = 1 + torch.randn(50, 512, generator=GENERATOR).cumsum(0) / 50
    drawn = {
        "curves": figures.training_curves(HISTORY),
        "mask": figures.mask_weights(history[-1], history),
    }
    for name, figure in drawn.items():
        path = tmp_path / "deep" / f"{name}.png"
        figures.save(figure, path)
        assert path.stat().st_size < 200_000
        picture = Image.open(path)
        assert picture.size == tuple(round(150 * side) for side in figure.get_size_inches())
        assert len(picture.convert("RGB").getcolors(10**6)) > 20
    figures.save(drawn["curves"], tmp_path / "curves.pdf")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")
