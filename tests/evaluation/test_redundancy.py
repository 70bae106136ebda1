"""How redundant dimensions are: numbers against closed forms, and what the picture is made of."""

import math

import numpy as np
import pytest
import torch

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.features import Features
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.redundancy import (
    class_contributions,
    redundancy,
    redundancy_numbers,
    similarity_figure,
)


def isotropic(count, dim):
    """Exactly uncorrelated, of variance 1: columns of a random orthogonal matrix that sum to 0."""
    noise = torch.randn(count, dim, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.linalg.qr(noise - noise.mean(dim=0)).Q * count**0.5


def test_decoupled_dimensions_and_a_single_direction_are_the_limits():
    numbers = redundancy_numbers(isotropic(64, 8) + 3)
    assert numbers["dim"] == numbers["varying"] == 8
    assert numbers["mean_correlation"] == pytest.approx(0, abs=1e-12)
    assert numbers["effective_rank"] == pytest.approx(8)
    assert numbers["participation_ratio"] == pytest.approx(8)
    one = redundancy_numbers(isotropic(64, 1) @ torch.tensor([[1.0, -2, 0.5, 0]], dtype=torch.float64))
    assert (one["dim"], one["varying"]) == (4, 3)
    assert one["mean_correlation"] == pytest.approx(1)
    assert one["effective_rank"] == pytest.approx(1)
    assert one["participation_ratio"] == pytest.approx(1)


def test_two_variances_have_the_ranks_that_one_computes_by_hand():
    numbers = redundancy_numbers(isotropic(50, 2) * torch.tensor([3**0.5, 1]))
    assert numbers["effective_rank"] == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert numbers["participation_ratio"] == pytest.approx(16 / 10)


def test_the_ranks_do_not_change_with_rotation_and_the_correlation_not_with_scale():
    feats = isotropic(60, 5) * torch.arange(1, 6)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)).double()).Q
    before, rotated = redundancy_numbers(feats), redundancy_numbers(feats @ rotation)
    for key in ("effective_rank", "participation_ratio"):
        assert rotated[key] == pytest.approx(before[key])
    assert rotated["mean_correlation"] > 0.1
    scaled = redundancy_numbers(feats @ rotation * torch.tensor([1, 10, -3, 0.1, 5]))
    assert scaled["mean_correlation"] == pytest.approx(rotated["mean_correlation"])


def test_collapsed_features_have_no_ranks():
    numbers = redundancy_numbers(torch.ones(5, 3))
    assert numbers["varying"] == 0
    assert all(math.isnan(numbers[key]) for key in ("effective_rank", "participation_ratio"))
    with pytest.raises(UserError, match="features must be of shape"):
        redundancy_numbers(torch.ones(1, 3))


def test_a_contribution_is_the_difference_in_standard_deviations_within():
    feats = torch.tensor([[3.0, 0, 7], [5, 1, 7], [0, 1, 7], [2, 0, 7], [0, 1, 7], [2, 0, 7]])
    contributions = class_contributions(Features(feats, torch.tensor([4, 4, 1, 1, 1, 1])))
    # dimension 0: means 1 and 4, and in each class values 1 beside its mean
    expected = torch.tensor([[-3, 0, 0], [3, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(contributions, expected)


def test_colours_of_a_row_are_one_where_dimensions_say_the_same():
    labels = torch.arange(30) % 3
    source = isotropic(30, 6)
    same = source[:, :1] * torch.tensor([1.0, -2, 5, -0.1, 3, 1])  # three of them turned around, or scaled
    redundant = redundancy(Features(same, labels))
    decoupled = redundancy(Features(source, labels))
    assert redundant.ranks.shape == (30, 6)
    assert redundant.labels.tolist() == sorted(labels.tolist())
    assert redundant.ranks.std(dim=1).max() < 1e-9
    assert decoupled.ranks.std(dim=1).mean() > 0.1
    torch.testing.assert_close(redundant.similarity, torch.ones(6, 6, dtype=torch.float64))
    assert redundancy(Features(source, labels), images=7).ranks.shape[0] == 7


def test_dimensions_that_never_vary_are_left_out_of_the_mean_correlation():
    feats = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    feats[:, 2] = 0.3
    expected = abs(np.corrcoef(feats[:, :2].numpy().T)[0, 1])
    assert redundancy_numbers(feats)["mean_correlation"] == pytest.approx(expected, abs=1e-5)
    assert np.isnan(redundancy_numbers(feats[:, 1:])["mean_correlation"])


def test_the_figure_has_a_row_an_encoder_with_its_numbers(tmp_path):
    labels = torch.arange(60) % 4
    wide = isotropic(60, 20)
    encoders = {
        "SimCLR": Features(wide[:, :2].repeat(1, 8), labels),
        "with redundancy reduction": Features(wide, labels),
    }
    figure = similarity_figure(encoders, max_dims=12)
    panels = figure.axes[:6]
    assert [panels[row * 3].get_title() for row in (0, 1)] == list(encoders)
    assert panels[2].get_title() == "|correlation|, mean 0.467\neffective rank 2.0"
    assert panels[5].get_title() == "|correlation|, mean 0.000\neffective rank 20.0"
    shapes = [panel.images[0].get_array().shape for panel in panels[3:]]
    assert shapes == [(60, 12), (4, 12), (12, 12)]
    assert panels[1].images[0].get_clim() == panels[4].images[0].get_clim()
    save(figure, tmp_path / "similarity.png", dpi=60)
    assert (tmp_path / "similarity.png").stat().st_size > 5000


def test_one_class_has_no_contributions_and_what_cannot_be_drawn_is_named():
    alone = Features(isotropic(6, 2), torch.zeros(6))
    assert class_contributions(alone).tolist() == [[0, 0]]
    assert similarity_figure({"a": alone}).axes[1].images[0].get_array().max() == 0
    with pytest.raises(UserError, match="encoders must be at least one"):
        similarity_figure({})
    with pytest.raises(UserError, match="2 or more images, got 1"):
        similarity_figure({"a": Features(torch.randn(1, 2), torch.zeros(1))})


def test_wide_features_are_drawn_at_equal_steps_in_a_small_file(tmp_path):
    feats = torch.randn(200, 512, generator=torch.Generator().manual_seed(0))
    encoders = [Features(each, torch.arange(200) % 10) for each in (feats, feats.relu())]
    figure = similarity_figure(dict(zip(("before training", "after training"), encoders)))
    assert figure.axes[2].images[0].get_array().shape == (96, 96)
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()][-1] == "511"
    save(figure, tmp_path / "correlation.png")
    assert (tmp_path / "correlation.png").stat().st_size < 200_000
