from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.report.axis import Axis
from eckart.report.labels import LABEL_HEIGHT, Label, spread
from eckart.report.numbers import finite
from eckart.report.svg import COLOURS, SHAPES, Chart, bars, category, heat_map, shape

reach = st.floats() | st.floats(1e-90, 1e3) | st.floats(0.1, 100)


def test_log_ticks_are_decades_over_a_wide_range() -> None:
    axis = Axis.around([14.1, 3.7e7], log=True)
    assert (axis.low, axis.high) == (10.0, 5e7)
    assert axis.ticks(8) == [1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7]
    assert axis.ticks(4) == [1e2, 1e4, 1e6]


def test_log_ticks_are_round_within_a_decade() -> None:
    assert Axis.around([14.1, 103.0], log=True).ticks(6) == pytest.approx([10, 20, 50, 100, 200])
    assert Axis.around([21.0, 38.0], log=True).ticks(6) == pytest.approx([20, 30, 40, 50])


def test_log_places_are_ratios() -> None:
    axis = Axis(1.0, 100.0, log=True)
    assert axis.at(10.0) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="no place on a logarithmic axis"):
        axis.at(0.0)


def test_linear_axis() -> None:
    axis = Axis.around([0.3, 7.27], zero=True)
    assert (axis.low, axis.high, axis.ticks(5)) == (0, 8, [0, 2, 4, 6, 8])
    assert axis.at(2) == pytest.approx(0.25)


def test_bad_axes_are_refused() -> None:
    with pytest.raises(ValueError, match="low < high"):
        Axis(1.0, 1.0)
    with pytest.raises(ValueError, match="positive"):
        Axis(0.0, 1.0, log=True)


@settings(deadline=None, max_examples=300)
@given(st.lists(reach, max_size=8), st.booleans(), st.booleans(), st.integers(3, 8))
def test_axes_hold_their_values(values: list[float], log: bool, zero: bool, most: int) -> None:
    axis = Axis.around(values, log=log, zero=zero)
    ticks = axis.ticks(most)
    assert len(ticks) <= most
    assert ticks == sorted(set(ticks))
    for value in [*ticks, *(v for v in values if finite(v) == v and (v > 0 or not log))]:
        assert -1e-6 <= axis.at(value) <= 1 + 1e-6


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 400), st.booleans()), max_size=14))
def test_spread_labels_do_not_cover_each_other_and_keep_their_order(places: list[tuple[float, float, bool]]) -> None:
    labels = [Label(x, y, f"method_{index}", left) for index, (x, y, left) in enumerate(places)]
    moved = spread(labels, 400.0)
    assert [label.text for label in moved] == [label.text for label in labels]
    for i, a in enumerate(moved):
        for j, b in enumerate(moved[:i]):
            (a_low, a_high), (b_low, b_high) = a.span(), b.span()
            if a_low < b_high and b_low < a_high:
                assert abs(a.y - b.y) >= LABEL_HEIGHT - 1e-6
                assert labels[i].y == labels[j].y or (a.y > b.y) == (labels[i].y > labels[j].y)


def test_a_label_with_room_stays() -> None:
    labels = [Label(0.1, 50, "a"), Label(0.1, 90, "b"), Label(0.8, 50, "c", left=True)]
    assert spread(labels, 200.0) == labels


def test_thirty_categories_are_distinct_in_colour_and_shape() -> None:
    assert len({(category(i), shape(i, "x")) for i in range(COLOURS * SHAPES)}) == 30


def test_chart_places_marks_in_percent_and_pixels() -> None:
    chart = Chart(Axis(0, 10), Axis(1, 100, log=True), title="a chart", height=200)
    chart.mark(2.5, 10, 0, "red", "a tip")
    chart.line([(0, 1), (10, 100)], "blue")
    html = chart.render()
    assert '<svg class="free" x="25.00%" y="100">' in html
    assert "<title>a tip</title>" in html
    assert 'points="0.0,200 1000.0,0"' in html


def test_drawings_escape_names() -> None:
    hostile = "</svg><script>alert(1)</script>\"'"
    chart = Chart(Axis(0, 1, label=hostile), Axis(0, 1, label=hostile), title=hostile)
    chart.mark(0.5, 0.5, 0, "red", hostile)
    chart.dot(0.5, 0.5, "red", tip=hostile)
    chart.column(0.5, 0.1, 0.5, "red", hostile)
    chart.label(Label(0.5, 20, hostile))
    drawings = [
        chart.render(),
        bars([(hostile, 1.0, hostile)], title=hostile),
        heat_map([hostile], [0], {(hostile, 0): (1.0, hostile)}, title=hostile, domain=(0.0, 1.0), written=str),
    ]
    for drawing in drawings:
        assert "<script" not in drawing
        assert "&lt;script&gt;" in drawing
        assert set(re.findall(r"</?([a-z]+)", drawing)) <= {
            *("svg", "div", "p", "text", "title", "rect", "line", "circle", "i", "span", "polyline", "path")
        }


def test_bars_show_the_unmeasured_and_the_whole() -> None:
    drawing = bars([("a", 2.0, "two"), ("b", None, "not measured")], title="t", whole=[4.0, 4.0])
    assert drawing.count("<rect") == 4
    assert "not measured" in drawing
