"""Charts: well-formed SVG, ticks that bracket the data, no colour that a dark page could not change."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.pages.charts import before_after, curve, curves, forest, nice_ticks, running_mean, strip


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_bracket_the_data(low, spread):
    ticks = nice_ticks(low, low + spread)
    assert 2 <= len(ticks) <= 9
    assert all(b > a for a, b in itertools.pairwise(ticks))
    slack = 1e-6 * max(1.0, abs(low), spread)
    assert ticks[0] <= low + slack
    assert ticks[-1] >= low + spread - slack


def test_running_mean():
    assert running_mean([1, 2, 3, 4, 5, 6]) == [2, 2.5, 3, 4, 4.5, 5]
    assert running_mean([7]) == [7]


@pytest.mark.parametrize(
    "svg",
    [
        curve([1], [0.0], label="a < b & c"),
        curve([1, 2, 3], [0.1, 0.4, 0.2], label="accuracy", show="{:.0%}".format, error=[0.1, 0.1, 0.1]),
        curve([1, 50], [1.19, 1.19], label="gamma", floor=1.0),
        curves([[(1, 0.2), (2, 0.3)], [(1, 0.1)], []], ["runs/a", "runs/<b>", "runs/c"], label="accuracy"),
        before_after([("sampled", 0.2, 0.02, 0.3, 0.02), ("greedy", 0.0, 0.0, 1.0, 0.0)]),
        strip(
            [("uniform", [0.44, 0.46], 0.45, 0.3, 0.6), None, ("a <b> & c", [0.4], 0.4, 0.4, 0.4)],
            label="accuracy",
            show="{:.1%}".format,
            tick="{:g}".format,
        ),
        forest([("runs/plain", 0.31, 0.02), ("runs/coupled", 0.35, 0.02)]),
    ],
)
def test_svg_is_well_formed(svg):
    root = ElementTree.fromstring(svg)
    assert root.get("aria-label")
    assert "nan" not in svg
    assert "#" not in svg
    for element in root.iter():
        for name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2"):
            assert math.isfinite(float(element.get(name, 0)))


def test_every_seed_has_its_ring():
    """A ring a value at its place, a dot a mean; an interval far beyond the rings is cut, and then has no end marks."""
    rows = [("uniform", [0.0, 10.0], 5.0, 2.0, 8.0), None, ("coupled", [4.0, 6.0], 5.0, -500.0, 510.0)]
    root = ElementTree.fromstring(strip(rows, label="x", show="{:g}".format, tick="{:g}".format, zero=True))
    rings, dots = (
        [float(e.get("cx")) for e in root.iter() if e.get("class") == kind and e.tag == "circle"]
        for kind in ("seed", "point")
    )
    assert len(rings) == 4
    assert rings[0] < rings[2] < rings[3] < rings[1]
    assert dots == pytest.approx([(rings[0] + rings[1]) / 2] * 2, abs=0.11)
    zero = next(float(e.get("x1")) for e in root.iter() if e.get("class") == "zero")
    assert zero == pytest.approx(rings[0], abs=0.11)
    groups = [e for e in root if e.tag == "g"]
    assert [g.get("class") for g in groups] == ["s0", "s2"]
    assert [sum(e.get("class") == "whisker" for e in g) for g in groups] == [3, 1]
    width = float(root.get("viewBox").split()[2])
    assert all(0 <= float(e.get(name, 0)) <= width for e in root.iter() for name in ("x1", "x2", "cx"))


@pytest.mark.parametrize("chart", ["forest", "strip"])
def test_long_names_take_no_room_from_the_chart(chart):
    """They stand above their lines, whole words where they can, never wider than the drawing; the tooltip has all."""
    names = ["grpo.learning_rate=1e-05, gamma_amp=1.2, window=8, eval.temperature=0.7", "x" * 400, "short", "a <b> & c"]
    if chart == "forest":
        svg = forest([(name, 0.4, 0.02) for name in names])
    else:
        rows = [(name, [0.3, 0.5], 0.4, 0.2, 0.6) for name in names]
        svg = strip([None, *rows], label="x", show="{:.1%}".format, tick="{:g}".format, zero=True)
    root = ElementTree.fromstring(svg)
    height = float(root.get("viewBox").split()[3])
    texts = [e for e in root if e.get("class") == "name"]
    assert [next(e for e in text if e.tag == "title").text for text in texts] == names
    points = [float(e.get("cy")) for e in root.iter() if e.get("class") == "point"]
    rows = [[float(e.get("y")) for e in text if e.tag == "tspan"] for text in texts]
    words = [[e.text for e in text if e.tag == "tspan"] for text in texts]
    assert words[0] == ["grpo.learning_rate=1e-05, gamma_amp=1.2, window=8,", "eval.temperature=0.7"]
    assert all(len(text) <= 50 for row in words for text in row) and max(map(len, words)) == 3
    assert words[1][-1].endswith("...")
    ends = [0.0, *points]
    for before, row, point in zip(ends, rows, points):  # a name is below the line before and above its own
        assert before < row[0] and row[-1] < point < height
    spans = {(float(e.get("y1")), float(e.get("y2"))) for e in root.iter() if e.get("class") == "grid"}
    assert not any(top < y < bottom for top, bottom in spans for row in rows for y in row)
    left = min(float(e.get("x1")) for e in root.iter() if e.get("class") == "grid")
    assert left < 40


@pytest.mark.parametrize("value", [0.01, 0.97])
def test_a_share_stays_between_none_and_all(value):
    """Whiskers and axes end at 0% and 100%, wherever the normal interval of a few questions would."""
    for svg in (forest([("a", value, 0.05)]), before_after([("a", value, 0.05, value, 0.05)])):
        root = ElementTree.fromstring(svg)
        ticks = [e.text for e in root if e.get("class") == "tick"]
        assert all(0 <= float(tick.rstrip("%")) <= 100 for tick in ticks)
        lines = [e for e in root.iter() if e.get("class") in ("grid", "whisker")]
        places = {kind: [float(e.get("x1")) for e in lines if e.get("class") == kind] for kind in ("grid", "whisker")}
        assert min(places["grid"]) <= min(places["whisker"]) and max(places["whisker"]) <= max(places["grid"])


def test_short_names_stand_beside_their_lines():
    root = ElementTree.fromstring(forest([("uniform", 0.4, 0.02), ("coupled", 0.5, 0.02)]))
    assert [e.text for e in root if e.get("class") == "name"] == ["uniform", "coupled"]
    left = min(float(e.get("x1")) for e in root.iter() if e.get("class") == "grid")
    assert left == 16 + 8 * 7
