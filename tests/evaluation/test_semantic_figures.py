"""Pictures of ICL-MSR: what is drawn, and from which numbers."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.figures import save
from metamask_plugin.evaluation.semantic_figures import (
    gram_matrix,
    mean_gram,
    mean_off_diagonal,
    region_bars,
    semantic_maps,
    weighted_maps,
)

GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = torch.randn(3, 4, 5, generator=GENERATOR)
MAPS = torch.randn(3, 5, 2, 6, generator=GENERATOR)


def bar_rows(names, groups, **more):
    return [
        {"name": name, "trained on": trained, "tested on": tested, "n": 1, "knn5": 10.0 + 7 * i, **more}
        for i, (trained, tested) in enumerate(groups)
        for name in names
    ]


FOUR = [("full", "foreground"), ("foreground", "full"), ("full", "full"), ("foreground", "foreground")]


def test_region_bars_are_grouped_in_the_papers_order_with_their_values_above():
    rows = bar_rows(["a", "b"], FOUR, linear=20.0, linear_std=None, knn5_std=2.0)
    rows[1]["knn5"] = None
    figure = region_bars(rows)
    knn, linear = figure.axes
    assert [tick.get_text() for tick in knn.get_xticklabels()] == [
        "full →\nfull (1)",
        "full →\nforeground (2)",
        "foreground →\nforeground (3)",
        "foreground →\nfull (4)",
    ]
    first, second = (bars for bars in knn.containers if str(bars.get_label()) in "ab")
    assert [bar.get_height() for bar in first] == [24, 10, 31, 17]
    assert [bar.get_height() for bar in second] == [24, 31, 17], "without the missing one"
    assert {text.get_text() for text in knn.texts} == {"24.0", "10.0", "31.0", "17.0"}
    assert len(knn.containers) == 2 + 7, "an error bar each"
    assert len(linear.containers) == 2, "no error bars over one seed"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    spans = [(bar.get_x(), bar.get_x() + bar.get_width()) for bars in (first, second) for bar in bars]
    assert all(low >= high for (_, high), (low, _) in zip(sorted(spans), sorted(spans)[1:])), "no overlap"


def test_region_bars_say_over_how_many_seeds_they_are():
    rows = bar_rows(["a"], FOUR[:2], knn5_std=2.0)
    rows[0]["n"], rows[1]["n"] = 3, 5
    assert region_bars(rows)._supxlabel.get_text().endswith("over 3 to 5 seeds")
    assert "error bars" not in region_bars(bar_rows(["a"], FOUR))._supxlabel.get_text()


def test_many_region_bars_are_put_below_each_other_and_wrong_rows_are_named():
    groups = [*FOUR, ("full", "background"), ("foreground", "background")]
    figure = region_bars(bar_rows(list("abcde"), groups, linear=30.0))
    upper, lower = figure.axes
    assert upper.get_position().x0 == lower.get_position().x0
    assert upper.get_xticklabels()[-1].get_text() == "foreground →\nbackground"
    with pytest.raises(UserError, match="rows must be one for each bar, got 8; summarise"):
        region_bars(bar_rows(["a"], FOUR) * 2)
    with pytest.raises(UserError, match="at least one, with a column knn<k> or linear"):
        region_bars([])


def semantic_inputs(count, vectors):
    images = torch.rand(count, 3, 24, 24, generator=GENERATOR)
    maps = torch.rand(count, 8, 3, 3, generator=GENERATOR)
    return images, maps, torch.rand(count, vectors, 8, generator=GENERATOR)


def test_semantic_maps_are_heat_in_units_of_the_images_largest_and_deviations_from_the_mean():
    images, maps, weights = semantic_inputs(2, 3)
    figure = semantic_maps(images, maps, weights)
    grid = np.array(figure.axes[:-2]).reshape(5, 4)
    heat = torch.einsum("nc,chw->nhw", weights[1], maps[1])
    heat = torch.nn.functional.interpolate(heat[None], (24, 24), mode="bilinear")[0]
    heat = heat / heat.max()
    assert np.allclose(grid[3, 0].images[0].get_array(), images[1].permute(1, 2, 0))
    assert np.allclose(grid[4, 0].images[1].get_array(), heat.mean(0), atol=1e-6)
    for t in range(3):
        hot, apart = grid[3, t + 1].images[1], grid[4, t + 1].images[1]
        assert np.allclose(hot.get_array(), heat[t], atol=1e-6)
        assert np.allclose(apart.get_array(), heat[t] - heat.mean(0), atol=1e-6)
        assert hot.get_clim() == (0, 1)
        assert apart.get_clim() == grid[1, 1].images[1].get_clim(), "one scale for all images"
        assert -apart.get_clim()[0] == apart.get_clim()[1] >= np.abs(apart.get_array()).max()


def test_semantic_maps_draw_6_images_and_14_vectors_at_most():
    assert len(semantic_maps(*semantic_inputs(8, 2)).axes) == 17 * 3 + 2
    figure = semantic_maps(*semantic_inputs(1, 20))
    assert len(figure.axes) == 2 * 15 + 2
    assert figure.get_suptitle() == "Heat maps of 14 of the 20 semantic weight vectors"
    images, maps, weights = semantic_inputs(2, 3)
    with pytest.raises(UserError, match=r"images must be of shape \(2, 3, H, W\), got \(1, 3, 24, 24\)"):
        semantic_maps(images[:1], maps, weights)
    with pytest.raises(UserError, match="feature maps must be of shape"):
        semantic_maps(images, maps[:, :5], weights)
    silent = semantic_maps(images, torch.zeros_like(maps), weights)
    assert np.isfinite(silent.axes[1].images[1].get_array()).all()


def test_gram_matrices_share_a_scale_and_have_numbers_where_they_fit():
    after = torch.rand(5, 6, 9, generator=GENERATOR)
    figure = gram_matrix(torch.ones(5, 6, 9) + 0.01 * after, after)
    left, right = figure.axes[:2]
    assert np.allclose(right.images[0].get_array(), mean_gram(after))
    assert left.images[0].get_clim() == right.images[0].get_clim() == (0, 1)
    assert (
        right.get_title()
        == f"after training: mean off the diagonal {mean_off_diagonal(mean_gram(after)):.3f}"
    )
    assert [text.get_text() for text in right.texts][1] == f"{mean_gram(after)[0, 1]:.3f}"
    assert len(left.texts) == 36
    signed = torch.randn(2, 9, 20, generator=GENERATOR)
    figure = gram_matrix(signed, signed)
    assert figure.axes[0].images[0].get_clim() == (-1, 1)
    assert len(figure.axes[0].texts) == 0
    with pytest.raises(UserError, match=r"2 or more vectors, before as after, got \(9, 6\)"):
        gram_matrix(signed, after)


def test_photographs_keep_their_colours_in_a_file(tmp_path):
    save(semantic_maps(*semantic_inputs(1, 3)), tmp_path / "maps.png")
    save(region_bars(bar_rows(list("abcd"), FOUR, linear=20.0)), tmp_path / "bars.png")
    assert Image.open(tmp_path / "maps.png").mode == "RGB"
    assert Image.open(tmp_path / "bars.png").mode == "P"
    assert max((tmp_path / name).stat().st_size for name in ("maps.png", "bars.png")) < 400_000


def test_a_weighted_map_is_the_rectified_sum_over_channels():
    found = weighted_maps(MAPS, WEIGHTS)
    assert found.shape == (3, 4, 2, 6)
    for b in range(3):
        for t in range(4):
            expected = sum(WEIGHTS[b, t, c] * MAPS[b, c] for c in range(5)).clamp(min=0)
            torch.testing.assert_close(found[b, t], expected)


def test_the_gram_matrix_is_the_mean_cosine_over_images():
    found = mean_gram(WEIGHTS * torch.logspace(-3, 3, 4)[:, None])
    for s in range(4):
        for t in range(4):
            cosines = [torch.cosine_similarity(image[s], image[t], dim=0).item() for image in WEIGHTS]
            assert found[s, t].item() == pytest.approx(sum(cosines) / 3, abs=1e-6)


def test_the_mean_outside_the_diagonal_counts_every_pair_once():
    gram = mean_gram(WEIGHTS)
    pairs = [gram[s, t].item() for s in range(4) for t in range(4) if s != t]
    assert mean_off_diagonal(gram) == pytest.approx(sum(pairs) / 12, abs=1e-6)
    assert math.isnan(mean_off_diagonal(torch.ones(1, 1)))


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(UserError, match=r"feature maps must be of shape \(3, 5, h, w\), got \(3, 4, 2, 6\)"):
        weighted_maps(MAPS[:, :4], WEIGHTS)
    with pytest.raises(UserError, match=r"semantic weights must be of shape \(B, n, C\).*got \(4, 5\)"):
        mean_gram(WEIGHTS[0])
    with pytest.raises(UserError, match="one or more of each"):
        mean_gram(WEIGHTS[:0])
