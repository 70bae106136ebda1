"""Figures of masks: what is drawn, from which numbers."""

import numpy as np
import pytest
from matplotlib.colors import same_color

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.mask_figures import (
    BLUE,
    RED,
    confounder_scatter,
    encoder_scatter,
    random_mask_scatter,
)


def rows_of(encoder="conv", base=50.0, rates=(0.05, 0.1, 0.5), draws=10, metric="knn20"):
    points = [(0.0, 0, base)]
    points += [(rate, draw, base - 10 * rate + draw / 10) for rate in rates for draw in range(draws)]
    return [
        {"encoder": encoder, "rate": rate, "draw": draw, "metric": metric, "value": value}
        for rate, draw, value in points
    ]


def dashed(axes):
    return [line for line in axes.lines if line.get_linestyle() == "--"]


def test_every_mask_is_a_point_near_its_rate_and_the_unmasked_accuracy_a_red_dashed_line():
    figure = random_mask_scatter(rows_of() + rows_of("ResNet-18", 60.0) + rows_of("third"))
    assert [axes.get_title() for axes in figure.axes] == ["conv", "ResNet-18", "third"]
    axes = figure.axes[1]
    (line,) = dashed(axes)
    assert same_color(line.get_color(), RED)
    assert set(line.get_ydata()) == {60.0}
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [len(line.get_xdata()) for line in points] == [10, 10, 10]
    for place, (line, rate) in enumerate(zip(points, (0.05, 0.1, 0.5))):
        x = np.asarray(line.get_xdata())
        assert (abs(x - place) < 0.5).all()
        assert len(np.unique(x)) == 10, "points of one rate do not lie on each other"
        assert sorted(line.get_ydata()) == pytest.approx([60 - 10 * rate + d / 10 for d in range(10)])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["5 %", "10 %", "50 %"]
    assert axes.get_ylabel() == "kNN accuracy, k = 20 (%)"


def test_rows_without_encoders_are_one_panel_and_rows_that_do_not_fit_are_refused():
    rows = rows_of(metric="linear")
    for row in rows:
        del row["encoder"]
    (axes,) = random_mask_scatter(rows).axes
    assert dashed(axes)[0].get_ydata()[0] == 50
    assert axes.get_ylabel() == "linear probe accuracy (%)"
    with pytest.raises(UserError, match="with its unmasked accuracy, at rate 0"):
        random_mask_scatter([row for row in rows if row["rate"] > 0])
    with pytest.raises(UserError, match=r"rows must be of one metric, got \['knn20', 'linear'\]"):
        random_mask_scatter(rows_of() + rows_of(metric="linear"))
    with pytest.raises(UserError, match=r"rows must be of one metric, got \[\]"):
        confounder_scatter([])


def test_encoders_stand_side_by_side_with_their_range():
    figure = encoder_scatter(rows_of() + rows_of("ResNet-18", 60.0), rate=0.1)
    (axes,) = figure.axes
    points = [line for line in axes.lines if line.get_marker() == "o"]
    assert [min(line.get_ydata()) for line in points] == [49, 59]
    assert [lines.get_segments()[0][0][1] for lines in axes.collections] == [50, 60]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["conv\n49.00 to 49.90", "ResNet-18\n59.00 to 59.90"]
    with pytest.raises(UserError, match=r"masks of conv must be some of rate 0\.2"):
        encoder_scatter(rows_of(), rate=0.2)


def test_nothing_and_all_dropped_are_boxed_red_and_blue():
    rows = rows_of(rates=(0.1, 0.5)) + rows_of(rates=(1.0,), draws=1)[1:]
    (axes,) = confounder_scatter(rows).axes
    boxes = [line for line in axes.lines if line.get_marker() == "s"]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in boxes] == [(0, 50), (3, 40)]
    assert [same_color(line.get_color(), c) for line, c in zip(boxes, (RED, BLUE))] == [True, True]
