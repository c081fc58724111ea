"""The arithmetic of the pictures."""

from __future__ import annotations

import math

import pytest

from wrapq.html.charts import line_chart, nice_range, scatter


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1, (0, 1, 0.25)),
        (18, 26, (18, 26, 2)),
        (0.05, 0.13, (0, 0.15, 0.05)),
        (3, 3, (0, 3, 1)),
        (0, 0, (-1, 1, 0.5)),
    ],
)
def test_axes_end_at_round_numbers_that_hold_all_values(low: float, high: float, expected: tuple[float, ...]) -> None:
    found = nice_range(low, high)
    assert found[0] <= low <= high <= found[1]
    steps = (found[1] - found[0]) / found[2]
    assert steps == pytest.approx(round(steps))
    assert 2 <= steps <= 6
    assert found == pytest.approx(expected)


def test_points_lie_where_their_values_are() -> None:
    chart = line_chart("t", "block", "error", {"a": [0.0, 1.0, 0.5], "gap": [0.5, math.nan, 1.0]}, "{:g}".format)
    assert chart is not None
    first, second, third = chart.lines[0].marks
    assert (first.x, first.y) == (chart.left, chart.bottom)
    assert second.y == chart.top
    assert third.x == chart.right
    assert third.y == pytest.approx((chart.top + chart.bottom) / 2)
    assert len(chart.lines[1].marks) == 2
    assert second.title == "a, block 1: 1"
    assert line_chart("t", "block", "error", {"one": [1.0]}, str) is None
    assert scatter("t", "x", "y", [(math.nan, 1.0, "a", "")], (str, str)) is None
