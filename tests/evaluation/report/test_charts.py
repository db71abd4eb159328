"""Curves as SVG: in the right place, with round numbers, and never more than a page can bear."""

from __future__ import annotations

import re

import pytest

from ngrpo_lora.evaluation.report.charts import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, WIDTH, Line, chart, ticks


def points(svg: str, tag: str = "polyline") -> list[tuple[float, float]]:
    (found,) = re.findall(rf'<{tag} class="[^"]*" points="([^"]*)"', svg)
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in found.split())]


def test_ticks_are_round_numbers_between_both_ends():
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.41, 0.59) == [0.45, 0.5, 0.55]
    assert ticks(-8.2, -5.5) == [-8, -7, -6]
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    for low, high in ((0, 1e-7), (-3e5, 2e9), (0.999, 1.001)):
        found = ticks(low, high)
        assert 2 <= len(found) <= 6
        assert low <= found[0] < found[-1] <= high


def test_a_line_goes_from_edge_to_edge_and_up_where_values_rise():
    (left, low), (_, middle), (right, high) = points(chart("t", "y", [Line("a", [(0, 1.0), (5, 2.0), (10, 3.0)])]))
    assert (left, right) == (LEFT, WIDTH - RIGHT)
    assert high < middle < low < HEIGHT - BOTTOM
    assert middle == pytest.approx((low + high) / 2, abs=0.11)


def test_a_band_lies_around_its_line():
    svg = chart("t", "y", [Line("a", [(0, 0.5), (10, 0.5)], spread=[0.1, 0.2])])
    line, band = points(svg), points(svg, "polygon")
    above, below = [line[i][1] - band[i][1] for i in (0, 1)], [band[-1 - i][1] - line[i][1] for i in (0, 1)]
    assert above == pytest.approx(below, abs=0.21)
    assert above[1] == pytest.approx(2 * above[0], abs=0.21)
    assert "one standard deviation" in svg


def test_values_that_never_change_and_single_ones_are_drawn():
    (_, zero), (_, same) = points(chart("t", "y", [Line("a", [(0, 0.0), (9, 0.0)])]))
    assert zero == same == HEIGHT - BOTTOM  # a share has no values below it
    assert "<circle" in chart("t", "y", [Line("a", [(0, -3.0)])])
    assert chart("t", "y", [Line("a", [])]) == ""


def test_a_long_line_is_averaged():
    long = [(float(i), float(i % 2)) for i in range(MOST_POINTS * 10)]
    svg = chart("t", "y", [Line("a", long, spread=[0.25] * len(long))])
    assert len(points(svg)) == MOST_POINTS
    assert len({y for _, y in points(svg)}) == 1
    assert len(points(svg, "polygon")) == 2 * MOST_POINTS


def test_names_are_escaped():
    svg = chart("<b>", "<i>", [Line('"<u>', [(0, 1.0)], dots=True), Line("b", [(0, 2.0)])], note="<s>")
    assert not re.search(r"<[bus]>|<i>", svg)
    assert svg.count("&lt;u&gt;") == 3  # in the description, the legend and the dot's title
