"""Standard errors, paired intervals and McNemar's test, against figures worked by hand and against scipy's formula."""

from __future__ import annotations

import math
from random import Random

import pytest

from training.statistics import paired_difference, spread, standard_error, t_quantile


def test_standard_error():
    assert standard_error(128, 512) == pytest.approx(math.sqrt(0.25 * 0.75 / 512))
    assert standard_error(0, 10) == 0
    assert standard_error(0, 0) == 0


def test_paired_difference_by_hand():
    before = [True, True, False, False, False, False, False, False]
    after = [True, False, True, True, True, True, False, False]
    found = paired_difference(before, after)
    assert (found.gained, found.lost) == (4, 1)
    assert found.difference == pytest.approx(3 / 8)
    error = math.sqrt((5 / 8 - (3 / 8) ** 2) / 8)
    assert found.low == pytest.approx(3 / 8 - 1.959964 * error)
    assert found.high == pytest.approx(3 / 8 + 1.959964 * error)
    assert found.p_value == pytest.approx(2 * (1 + 5) / 2**5)  # at most one of five fair coins, twice


def test_no_change_is_no_evidence():
    found = paired_difference([True, False], [True, False])
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)


def test_large_counts_do_not_overflow():
    found = paired_difference([False] * 5000, [True] * 5000)
    assert 0 <= found.p_value < 1e-300
    assert found.difference == 1


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_unequal_lengths_are_refused(before, after):
    with pytest.raises(ValueError, match="must have one length"):
        paired_difference(before, after)


@pytest.mark.parametrize(
    ("degrees", "level", "known"),
    [  # printed tables of Student's t, two-sided
        (1, 0.95, 12.7062),
        (2, 0.95, 4.30265),
        (3, 0.95, 3.18245),
        (4, 0.95, 2.77645),
        (5, 0.95, 2.57058),
        (9, 0.95, 2.26216),
        (30, 0.95, 2.04227),
        (1000, 0.95, 1.96234),
        (1, 0.99, 63.6567),
        (2, 0.99, 9.92484),
        (7, 0.9, 1.89458),
    ],
)
def test_t_quantile(degrees, level, known):
    assert t_quantile(degrees, level) == pytest.approx(known, rel=3e-6)


def test_spread_by_hand():
    found = spread([0.44, 0.46, 0.42])
    assert found.count == 3
    assert found.mean == pytest.approx(0.44)
    assert found.deviation == pytest.approx(0.02)
    assert found.error == pytest.approx(0.02 / math.sqrt(3))
    assert found.high - found.mean == pytest.approx(4.30265 * 0.02 / math.sqrt(3), rel=1e-5)
    assert found.mean - found.low == pytest.approx(found.high - found.mean)
    alone = spread([0.5])
    assert (alone.count, alone.mean, alone.low, alone.high) == (1, 0.5, -math.inf, math.inf)
    assert math.isnan(alone.deviation) and math.isnan(alone.error)


def test_the_interval_of_three_values_holds_its_mean_as_often_as_it_says():
    random = Random(0)
    inside = 0
    for _ in range(4000):
        found = spread([random.gauss(0, 1) for _ in range(3)])
        inside += found.low <= 0 <= found.high
    assert inside / 4000 == pytest.approx(0.95, abs=0.015)  # with the normal 1.96 it is 0.81


@pytest.mark.parametrize(("degrees", "level"), [(0, 0.95), (3, 0.0), (3, 1.0)])
def test_no_quantile(degrees, level):
    with pytest.raises(ValueError, match="at least 1 and level inside"):
        t_quantile(degrees, level)


def test_no_values():
    with pytest.raises(ValueError, match="at least one, got"):
        spread([])
