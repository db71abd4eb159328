"""Wires are where the canvas draws them, and find their way around nodes."""

from __future__ import annotations

import math

import numpy as np
import pytest
from wires import curve, nodes_before, route

BOXES = {"a": (0.0, 0.0, 100.0, 100.0), "b": (400.0, 0.0, 100.0, 100.0)}
START, END, OWN = (90.0, 14.0), (410.0, 14.0), ("a", "b")
WALL = {"wall": (200.0, -100.0, 100.0, 200.0)}


def test_a_wire_without_reroutes_is_a_bezier_curve_of_which_a_quarter_is_level():
    wire = curve([(0, 0), (300, 400)])
    half = np.array([(0 + 3 * 125 + 3 * 175 + 300) / 8, 200])  # at t = 1/2, with control points (125, 0), (175, 400)
    assert np.abs(wire - half).sum(1).min() < 5
    assert (wire[0].tolist(), wire[-1].tolist()) == ([0, 0], [300, 400])
    assert abs(math.atan2(*(wire[1] - wire[0])[::-1])) < 0.2


def test_a_wire_passes_its_reroutes_in_the_middle_direction():
    wire = curve([(0, 0), (100, 100), (300, 100)])
    place = int(np.abs(wire - (100, 100)).sum(1).argmin())
    assert wire[place].tolist() == [100, 100]
    before, after = wire[place - 1] - wire[place - 4], wire[place + 4] - wire[place + 1]
    angles = [math.degrees(math.atan2(*way[::-1])) for way in (before, after)]
    assert angles[0] > 22.5 > angles[1] > 0


def test_a_free_wire_has_no_reroutes():
    assert route(START, [END], OWN, BOXES, []) == []


def test_a_wire_goes_around_a_node_and_not_where_another_one_goes():
    boxes = BOXES | WALL
    assert nodes_before(curve([START, END]), OWN, boxes) == ["wall"]
    way = route(START, [END], OWN, boxes, [])
    assert not nodes_before(curve([START, *way, END]), OWN, boxes)
    other = route(START, [END], OWN, boxes, [way])
    assert abs(other[0][1] - way[0][1]) >= 14


def test_a_wire_goes_around_a_node_that_is_before_any_of_its_ends():
    far = (410.0, 90.0)
    boxes = BOXES | {"low": (200.0, 78.0, 100.0, 20.0)}
    assert route(START, [END], OWN, boxes, []) == []
    for ends in ([END, far], [far, END]):
        way = route(START, ends, OWN, boxes, [])
        assert way
        assert not any(nodes_before(curve([START, *way, end]), OWN, boxes) for end in ends)


def test_a_wire_that_goes_back_passes_between_its_nodes():
    boxes = {"a": (0.0, 0.0, 300.0, 100.0), "b": (0.0, 180.0, 300.0, 100.0)}
    start, end = (290.0, 14.0), (10.0, 200.0)
    assert nodes_before(curve([start, end]), OWN, boxes)
    way = route(start, [end], OWN, boxes, [])
    assert [100 < level < 180 for _, level in way] == [True, True]
    assert not nodes_before(curve([start, *way, end]), OWN, boxes)


def test_no_way_is_said():
    boxes = BOXES | {"wall": (110.0, -100.0, 280.0, 200.0)}
    with pytest.raises(ValueError, match="no way from a to b"):
        route(START, [END], OWN, boxes, [])
