"""Timings in paired rounds, and peaks of live memory."""

import itertools
import json
import weakref

import common
import pytest
import torch
from common import Rounds, Spread, bar_chart, paired_rounds, table, write
from memory import LiveBytes, peak_memory

KILOBYTE = 1024


class Machine:
    """A clock that candidates move."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(common.time, "perf_counter", lambda: self.now)

    def candidate(self, name, work, slowdown=lambda: 1.0):
        def call():
            self.calls.append(name)
            self.now += work * slowdown()

        return call


def test_every_round_times_all_in_turn_and_ratios_are_within_a_round(monkeypatch):
    machine = Machine(monkeypatch)

    def slow():  # the same for both of a round
        return 1.5 ** ((len(machine.calls) - 1) // 2)

    candidates = {"unit": machine.candidate("unit", 2.0, slow), "ours": machine.candidate("ours", 5.0, slow)}
    rounds = paired_rounds(candidates, rounds=3, warmup=1, report=None)
    assert machine.calls == ["unit", "ours"] * 4
    assert rounds.seconds["unit"][2] > 2 * rounds.seconds["unit"][0]  # the machine has become slower
    assert rounds.ratio("ours") == pytest.approx((2.5, 2.5, 2.5))
    assert rounds.ratio("unit") == (1, 1, 1)


def test_steps_and_repeats_divide(monkeypatch):
    machine = Machine(monkeypatch)
    candidates = {"unit": machine.candidate("unit", 1.0), "four": machine.candidate("four", 6.0)}
    rounds = paired_rounds(candidates, rounds=1, repeats=2, warmup=0, steps={"four": 4}, report=None)
    assert rounds.ratio("four").median == pytest.approx(1.5)
    assert machine.calls == ["unit", "unit", "four", "four"]


def test_a_candidate_that_fails_is_named_and_the_others_go_on():
    def fails():
        raise RuntimeError("no such\nkernel")

    said = []
    rounds = paired_rounds({"unit": int, "broken": fails, "ours": int}, rounds=2, report=said.append)
    assert set(rounds.seconds) == {"unit", "ours"} and len(rounds.seconds["ours"]) == 2
    assert rounds.failed == {"broken": "RuntimeError: no such kernel"}
    assert said[0] == "left out: broken: RuntimeError: no such kernel"
    with pytest.raises(RuntimeError, match="no such"):
        paired_rounds({"unit": fails}, rounds=1, report=None)


def test_when_time_is_over_one_round_of_the_unit_remains():
    rounds = paired_rounds({"unit": int, "ours": int}, rounds=5, until=0.0, report=None)
    assert len(rounds.seconds["unit"]) == 1
    assert rounds.failed == {"ours": "TimeoutError: no time was left"}


def test_median_of_quotients_is_not_quotient_of_medians():
    rounds = Rounds("unit", {"unit": [1.0, 2.0, 4.0], "ours": [3.0, 4.0, 4.0]})
    assert rounds.ratio("ours") == (2.0, 1.0, 3.0)


def test_live_bytes_counts_what_is_alive_once():
    with LiveBytes() as live:
        x = torch.zeros(KILOBYTE // 4)
        view = x[:10].view(2, 5)
        assert live.now == KILOBYTE
        y = x + 1
        del x
        assert live.now == 2 * KILOBYTE  # its storage is the view's as well
        del view
        assert live.now == KILOBYTE
        del y
    assert (live.now, live.peak) == (0, 2 * KILOBYTE)


def test_live_bytes_sees_what_autograd_keeps_and_lets_go():
    x = torch.zeros(KILOBYTE // 4, requires_grad=True)
    with LiveBytes([x]) as live:
        y = x.exp()  # kept for the backward pass
        loss = (y * 3).sum()
        del y
        assert live.now == 2 * KILOBYTE + 4
        loss.backward()
        del loss
        assert live.now == 2 * KILOBYTE  # x and its gradient
    assert live.peak >= 3 * KILOBYTE  # with the gradient on its way


def test_live_bytes_holds_nothing_alive():
    with LiveBytes() as live:
        x = torch.zeros(4)
        alive = weakref.ref(x)
        del x
        assert alive() is None and live.now == 0


def test_peak_memory_of_a_layer():
    layer = torch.nn.Linear(4, 8, bias=False)
    x = torch.zeros(16, 4)
    memory = peak_memory(lambda: layer(x).relu_(), [*layer.parameters(), x])
    if not torch.cuda.is_available():
        assert memory.resident == 4 * (32 + 64)
        # relu_ in place is on the layer's output, and its backward pass needs the result alone
        assert memory.peak == memory.resident + 4 * 16 * 8


def test_json_tells_the_hardware_and_no_names(tmp_path):
    path = write(
        "numbers", {"settings": {"out": tmp_path}, "ratio": Spread(1, 0.5, 2)._asdict()}, tmp_path / "a"
    )
    found = json.loads(path.read_text())
    assert found["ratio"] == {"median": 1, "low": 0.5, "high": 2}
    assert set(found["hardware"]) >= {"device", "threads", "torch", "python"}


def test_bar_chart_draws_every_bar_at_its_median_with_range_and_target():
    panels = {"left": {"one": Spread(1, 0.5, 3), "two": 2.0}, "right": {"three": 4.0}}
    figure = bar_chart(panels, "ratio", "title " * 30, {"left": {"two": 1.5}}, reference=1.0)
    left, right = figure.axes
    assert [bar.get_width() for bar in left.patches] == [1, 2] and [b.get_width() for b in right.patches] == [
        4
    ]
    assert [label.get_text() for label in left.get_yticklabels()] == ["one", "two"]
    assert left.get_legend() is not None and right.get_legend() is None
    assert left.get_xlim()[1] > 3
    assert "\n" in figure.get_suptitle()  # a long title is broken, not cut


def test_table_aligns_columns():
    lines = table(["name", "value"], [["a", 1], ["longer", 10.5]]).splitlines()
    assert lines == ["name    value", "------  -----", "a           1", "longer   10.5"]
    assert all(len(a) == len(b) for a, b in itertools.pairwise(lines))
