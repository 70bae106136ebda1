"""Figures of studies: what is drawn, from which numbers, and what is refused."""

import math

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image
from scipy import stats

from metamask_plugin.errors import UserError
from metamask_plugin.evaluation.figures import BLUE, ORANGE, save
from metamask_plugin.studies.figures import describe, draw

SEEDS = (5, 6, 7)


def rows(combinations, metric="knn200", seeds=SEEDS, base=40.0, step=2.0, checkpoints=("last", "best")):
    """Seed s of combination i is at base + step * i + s - 6; the best epoch one above the last."""
    return [
        {
            **columns,
            "seed": s,
            "checkpoint": c,
            "metric": metric,
            "value": base + step * i + s - 6 + (c == "best"),
        }
        for i, columns in enumerate(combinations)
        for s in seeds
        for c in checkpoints
    ]


def arms(count):
    return [{"arm": f"arm {i}"} for i in range(count)]


def bars_of(axes, upright=True):
    bars = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return [patch.get_height() if upright else patch.get_width() for patch in bars]


def hollow(axes):
    return [line for line in axes.lines if line.get_markerfacecolor() == "white"]


def words_of(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


HALF = stats.t.ppf(0.975, 2) / math.sqrt(3)  # of three seeds with a standard deviation of 1


def test_bars_show_means_intervals_seeds_and_the_papers_numbers():
    paper = [{"arm": "arm 1", "metric": "knn200", "value": 50.0}]
    layout = {"kind": "bars", "x": "arm", "metric": "knn200", "title": "Three arms"}
    figure = draw(layout, rows(arms(3), step=20), paper, ["arm"])
    (axes,) = figure.axes
    assert bars_of(axes) == [40, 60, 80]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["arm 0", "arm 1", "arm 2"]
    intervals = [line.get_ydata() for line in axes.lines if line.get_marker() == "None"]
    assert np.allclose(intervals, [[m - HALF, m + HALF] for m in (40, 60, 80)])
    seeds = [list(line.get_ydata()) for line in axes.lines if len(line.get_ydata()) == 3]
    assert seeds == [[39, 40, 41], [59, 60, 61], [79, 80, 81]]
    assert [list(line.get_ydata()) for line in hollow(axes)] == [[50]]
    assert axes.get_ylim()[0] == 0 and figure.get_suptitle() == "Three arms"
    assert words_of(figure) == ["95 % interval", "a seed", "the paper's number"]


def test_bars_far_from_0_say_where_their_axis_starts():
    (axes,) = draw(
        {"kind": "bars", "x": "arm", "metric": "knn200"}, rows(arms(3), base=85.0), [], ["arm"]
    ).axes
    start = axes.get_ylim()[0]
    assert 70 < start < 85 - HALF
    assert axes.get_ylabel() == f"axis from {start:g}"


def test_grouped_bars_in_panels():
    combinations = [{"arm": a, "on": o, "data": d} for d in "XY" for o in ("full", "back") for a in "abc"]
    layout = {
        "kind": "bars",
        "x": "on",
        "series": "arm",
        "metric": "knn200",
        "panels": "data",
        "checkpoint": "best",
    }
    figure = draw(layout, rows(combinations), [], ["arm"])
    assert [axes.get_title() for axes in figure.axes] == ["data X", "data Y"]
    assert bars_of(figure.axes[0]) == [41, 47, 43, 49, 45, 51]
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert words_of(figure)[:3] == ["a", "b", "c"]


def test_a_series_of_numbers_is_named_with_its_factor():
    combinations = [{"arm": a, "labels": share} for a in "ab" for share in (0.01, 0.1)]
    layout = {"kind": "bars", "x": "arm", "series": "labels", "metric": "knn200"}
    assert words_of(draw(layout, rows(combinations), [], ["arm"]))[:2] == ["labels 0.01", "labels 0.1"]


def test_what_the_layout_does_not_name_becomes_panels():
    combinations = [{"arm": a, "data": d, "rate": r} for d in "XY" for r in (0.1, 0.5) for a in "ab"]
    figure = draw({"kind": "bars", "x": "arm", "metric": "knn200"}, rows(combinations), [], ["data", "arm"])
    titles = [axes.get_title() for axes in figure.axes if axes.get_visible()]
    assert titles == [f"data {d}, rate {r}" for d in "XY" for r in (0.1, 0.5)]


def test_panels_of_another_order_have_a_scale_of_their_own():
    low, high = rows([{"arm": "a", "data": "X"}], base=10), rows([{"arm": "a", "data": "Y"}], base=80)
    layout = {"kind": "bars", "x": "arm", "metric": "knn200", "panels": "data"}
    one, other = draw(layout, low + high, [], ["data", "arm"]).axes
    assert one.get_ylim()[1] < 20 < 80 < other.get_ylim()[1]


def test_many_bars_lie_with_the_first_on_top():
    (axes,) = draw({"kind": "bars", "x": "arm", "metric": "knn200"}, rows(arms(16)), [], ["arm"]).axes
    assert bars_of(axes, upright=False) == [40 + 2 * i for i in range(16)]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]
    assert [text.get_text() for text in axes.get_yticklabels()][:2] == ["arm 0", "arm 1"]


def test_curves_over_numbers_are_in_their_order_with_bands_and_hollow_markers():
    combinations = [{"arm": a, "alpha": x} for a in "ab" for x in (100, 0.1, 10, 1)]
    paper = [{"arm": "b", "alpha": 10, "metric": "knn200", "value": 70.0}]
    layout = {"kind": "curve", "x": "alpha", "series": "arm", "metric": "knn200", "log_x": True}
    figure = draw(layout, rows(combinations), paper, ["arm", "alpha"])
    (axes,) = figure.axes
    first, second = [line for line in axes.lines if line.get_linestyle() == "-"]
    assert list(first.get_xdata()) == [0.1, 1, 10, 100] and list(first.get_ydata()) == [42, 46, 44, 40]
    assert [to_hex(line.get_color()) for line in (first, second)] == [BLUE.lower(), ORANGE.lower()]
    assert axes.get_xscale() == "log"
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].min() == pytest.approx(40 - HALF) and band[:, 1].max() == pytest.approx(46 + HALF)
    ((x, y),) = [(*line.get_xdata(), *line.get_ydata()) for line in hollow(axes)]
    assert (x, y) == (10, 70)


@pytest.mark.parametrize(("places", "log"), [(("none", "0.1", "shared"), False), ((0, 0.1, 1), True)])
def test_a_curve_over_words_or_over_0_on_a_log_scale_has_equal_steps(places, log):
    layout = {"kind": "curve", "x": "dropout", "metric": "knn200", "log_x": log}
    (axes,) = draw(layout, rows([{"dropout": place} for place in places]), [], ["dropout"]).axes
    assert axes.get_xscale() == "linear" and list(axes.lines[0].get_xdata()) == [0, 1, 2]
    assert [text.get_text() for text in axes.get_xticklabels()] == [str(place) for place in places]


def test_one_seed_has_neither_interval_nor_points():
    layout = {"kind": "curve", "x": "n", "metric": "knn200"}
    figure = draw(layout, rows([{"n": 2}, {"n": 4}], seeds=(5,)), [], ["n"])
    assert len(figure.axes[0].lines) == 1 and not figure.axes[0].collections and not figure.legends


def test_cost_has_intervals_in_both_directions_and_numbered_points():
    found = rows(arms(3)) + rows(arms(3), "seconds_per_epoch", base=100, step=50, checkpoints=("last",))
    found = [row for row in found if (row["arm"], row["metric"]) != ("arm 1", "seconds_per_epoch")]
    layout = {"kind": "cost", "x": "seconds_per_epoch", "series": "arm", "metric": "knn200"}
    paper = [{"arm": "arm 2", "metric": "knn200", "value": 50.0}]
    figure = draw(layout, found, paper, ["arm"])
    (axes,) = figure.axes
    means = [(*bars[0].get_xdata(), *bars[0].get_ydata()) for bars in axes.containers]
    assert means == [(100, 40), (200, 44)], "an arm without a cost is not drawn"
    across, up = axes.containers[0][2]
    assert np.ptp(across.get_segments()[0], axis=0) == pytest.approx([2 * HALF, 0])
    assert np.ptp(up.get_segments()[0], axis=0) == pytest.approx([0, 2 * HALF])
    assert [text.get_text() for text in axes.texts] == ["1", "2"]
    assert words_of(figure)[:2] == ["1  arm 0", "2  arm 2"]
    assert (*hollow(axes)[0].get_xdata(), *hollow(axes)[0].get_ydata()) == (200, 50)


@pytest.mark.parametrize("kind", ["bars", "curve", "cost"])
def test_sixteen_series_are_told_apart_and_named(kind, tmp_path):
    found = rows(
        [{"arm": f"arm {i}", "n": n} for i in range(16) for n in ((1, 2) if kind != "cost" else (1,))]
    )
    found += rows(arms(16), "seconds", base=60, step=7, checkpoints=("last",)) if kind == "cost" else []
    found = [{"n": 1} | row for row in found]
    layout = {"kind": kind, "x": "seconds" if kind == "cost" else "n", "series": "arm", "metric": "knn200"}
    figure = draw(layout, found, [], ["arm", "n"])
    (legend,) = figure.legends
    looks = set()
    for handle in legend.legend_handles[:16]:
        if kind == "bars":
            looks.add((handle.get_facecolor(), handle.get_hatch()))
        else:
            looks.add((handle.get_color(), handle.get_marker()))
    assert len(looks) == 16 and len(words_of(figure)) >= 17
    save(figure, tmp_path / "figure.png", dpi=60)
    picture = Image.open(tmp_path / "figure.png")
    assert picture.size == tuple(int(60 * side) for side in figure.get_size_inches())


def test_the_description_has_every_mean():
    combinations = [{"arm": a, "data": d} for d in "XY" for a in "ab"]
    layout = {"kind": "bars", "x": "arm", "metric": "knn200", "panels": "data"}
    words = describe(layout, rows(combinations), ["data", "arm"])
    assert words == "kNN, k = 200 (%) over arm. data X: a: 40; b: 42. data Y: a: 44; b: 46."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "bar"}, "figures.kind must be one of bars, cost, curve, got 'bar'; did you mean 'bars'"),
        ({"metric": "knn20"}, "figures.metric must be one of knn200, got 'knn20'; did you mean 'knn200'"),
        ({"x": "arms"}, "figures.x must be one of .*got 'arms'; did you mean 'arm'"),
        ({"series": "alpha"}, "figures.series must be one of .*got 'alpha'"),
        ({"panels": ["data"]}, "figures.panels must be one of .*got 'data'"),
        ({"kind": "cost", "x": "arm"}, "figures.x must be one of knn200, got 'arm'"),
        (
            {"checkpoint": "first"},
            "figures must be of finite values, for knn200 at the first epoch, got 'none'",
        ),
        ({"logx": True}, "figures must be given by .*got 'logx'"),
    ],
)
def test_a_layout_of_what_is_not_there_is_one_line(change, message):
    layout = {"kind": "bars", "x": "arm", "metric": "knn200", **change}
    with pytest.raises(UserError, match=message) as error:
        draw(layout, rows(arms(2)), [], ["arm"])
    assert "\n" not in str(error.value)
